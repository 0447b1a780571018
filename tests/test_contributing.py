"""The worked examples of .github/CONTRIBUTING.md: a method, an adapter and a task, each one file and one line."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from support import ROOT

PAGE = (ROOT / ".github" / "CONTRIBUTING.md").read_text()
FILE = re.compile(r"^`(fedray/[\w/]+\.py)`\n\n```python\n(.*?)^```$", re.M | re.S)
LINE = re.compile(r"^(?:and )?in `(fedray/[\w/]+__init__\.py)`[^\n]*:\n\n```text\n(.*?)^```$", re.M | re.S)

#: Runs by the command line: the new method, adapter and task, a refused option, and the table.
RUNS = """
import json, sys
from fedray.cli import main
common = sys.argv[1].split()
for name, flags in json.loads(sys.argv[2]).items():
    code = main([*flags[:1], *(common if flags[0] == "run" else []), *flags[1:]])
    print("CODE", name, code)
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A folder with a copy of the package to which the page's files and lines were added."""
    root = tmp_path_factory.mktemp("contributed")
    shutil.copytree(ROOT / "fedray", root / "fedray", ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in FILE.findall(PAGE):
        assert not (root / path).exists()
        (root / path).write_text(text)
    for path, line in LINE.findall(PAGE):
        register = (root / path).read_text()
        assert register.count("_CLASSES = (\n") == 1
        (root / path).write_text(re.sub(r"(_CLASSES = \(\n(?:    .*\n)*?)\)", rf"\g<1>{line})", register, count=1))
    return root


def test_each_example_is_one_file_of_under_60_lines_and_one_line():
    assert [p for p, _ in FILE.findall(PAGE)] == [
        "fedray/methods/median.py",
        "fedray/adapters/lora_rp.py",
        "fedray/data/tasks/endings.py",
    ]
    assert all(text.count("\n") < 60 for _, text in FILE.findall(PAGE))
    assert [(p, line.count("\n")) for p, line in LINE.findall(PAGE)] == [
        ("fedray/methods/__init__.py", 1),
        ("fedray/adapters/__init__.py", 1),
        ("fedray/data/tasks/__init__.py", 1),
    ]


def test_the_examples_run(extended, tiny, tmp_path):
    common = (
        f"--engine inline --model.path {tiny}/llama --data.source {tiny}/text.jsonl --data.max_length 48 "
        "--adapter.rank 2 --federation.clients 3 --federation.rounds 2 --federation.local_steps 2 --federation.lr 0.01"
    )
    runs = {
        "method": ["run", "--method.name", "median", "--method.share", "0.5"],
        "adapter": ["run", "--adapter.kind", "lora-rp", "--method.name", "fed-sb", "--federation.lr", "0.3"],
        "task": ["run", "--model.task", "endings"],
    }
    runs = {name: [*flags, "--output.dir", str(tmp_path / name)] for name, flags in runs.items()}
    runs["refused"] = ["run", "--method.share", "0.5", "--output.dir", str(tmp_path / "refused")]
    runs["table"] = ["methods"]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, common, json.dumps(runs)],
        env=os.environ | {"PYTHONPATH": str(extended), "COLUMNS": "200"},
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    codes = dict(re.findall(r"^CODE (\w+) (\d)$", done.stdout, re.M))
    assert codes == {"method": "0", "adapter": "0", "task": "0", "refused": "2", "table": "0"}, (
        done.stdout + done.stderr
    )
    assert "method.share belongs to median, not to fedex: leave it out" in done.stderr
    assert "median" in done.stdout and "lora-rp" in done.stdout
    summaries = {
        name: json.loads((tmp_path / name / "summary.json").read_text()) for name in ("method", "adapter", "task")
    }
    assert summaries["method"]["exactness"] > 1e-3
    assert summaries["adapter"]["exactness"] < 1e-6 and summaries["adapter"]["final"] < summaries["adapter"]["initial"]
    layers = summaries["adapter"]["trainable_params"] // 4
    assert summaries["adapter"]["bytes_up"] == summaries["adapter"]["bytes_down"] == 2 * 3 * 4 * 4 * layers
    assert summaries["task"]["metric"] == "loss" and summaries["task"]["final"] < summaries["task"]["initial"]
    assert (tmp_path / "adapter" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_battery_runs_over_the_new_method_and_finds_it_true(extended):
    """All but its closed form, which the page asks for beside the class."""
    asked = "(median and not closed) or (lora-rp and exact)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", ROOT / "tests" / "methods", "-k", asked],
        env=os.environ | {"PYTHONPATH": str(extended)},
        cwd=extended,
        capture_output=True,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed and int(passed[1]) > 15, done.stdout[-3000:]
