"""The image's recipe: clean, and nothing in it that is not named by its hash."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from manifests import K8S, lint_trust
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support import ROOT

RECIPE = (K8S / "Dockerfile").read_text()
LISTS = {p.stem: p.read_text() for p in (K8S / "requirements").glob("*.txt")}
ENTRY = re.compile(r"^([\w.-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", re.M)


def versions(*names: str) -> dict[str, str]:
    """By package: the version that the lists of these names give."""
    return {canonicalize_name(m[1]): m[2] for name in names for m in ENTRY.finditer(LISTS[name])}


def test_the_image_has_a_clean_recipe():
    if (hadolint := shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")) is None:
        pytest.skip("hadolint is not installed: pip install 'fedray[test]'")
    done = subprocess.run([hadolint, str(K8S / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout, done.stdout
    assert "USER 1000:1000" in RECIPE


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (r"@sha256:\w+", "", "the base 'python:3.11-slim-bookworm' is not named by its digest"),
        (r"FROM \S+", "FROM python:3.12", "the base 'python:3.12' is not named by its digest"),
        (r"--require-hashes --no-deps --only-binary :all: -r requirements/common", "-r requirements/common", "-r req"),
        (r"--no-deps --no-build-isolation \.", "--no-build-isolation .", "'pip install --no-build-isolation .' takes"),
        (r"--no-deps --no-build-isolation \.", "--no-deps fedray", "'pip install --no-deps fedray' takes"),
    ],
)
def test_what_comes_in_without_a_hash_is_refused(old, new, words):
    assert list(lint_trust.recipe(RECIPE)) == []
    text, count = re.subn(old, new, RECIPE)
    (fault,) = lint_trust.recipe(text)
    assert count == 1 and words in fault


def test_the_lists_hold_what_setup_cfg_asks_for_each_with_its_hashes():
    for text in LISTS.values():
        rest = re.sub(r"^--extra-index-url https://download.pytorch.org/whl/cpu\n", "", ENTRY.sub("", text))
        assert rest == ""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    wanted = [setup["options"]["install_requires"], *(setup["options.extras_require"][e] for e in ("optuna", "track"))]
    lines = [line.strip() for text in wanted for line in text.splitlines()]
    for device in ("gpu", "cpu"):
        there = versions("common", "source", device)
        for line in (line for line in lines if line and not line.startswith("#")):
            asked = Requirement(line)
            assert asked.specifier.contains(there[canonicalize_name(asked.name)], prereleases=True), line
    assert versions("cpu")["torch"].split("+")[0] == versions("gpu")["torch"]
    assert versions("source").keys() == {"deepspeed"}  # it is built: everything else is a wheel


def steps() -> list[str]:
    """The recipe's commands that install or try what is installed."""
    runs = re.findall(r"^RUN (.*)", RECIPE.replace("\\\n", " "), re.M)
    return [run.split("&& useradd")[0] for run in runs if "pip install" in run or "fedray methods" in run]


def copied(work: Path, device: str) -> None:
    """What the recipe copies into the image, in a folder."""
    for line in re.findall(r"^COPY (.*)", RECIPE.replace("${DEVICE}", device), re.M):
        *sources, target = line.split()
        for source in map(ROOT.joinpath, sources):
            if source.is_dir():
                shutil.copytree(source, work / target, dirs_exist_ok=True)
            else:
                (work / target).mkdir(parents=True, exist_ok=True)
                shutil.copy(source, work / target)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_images_install_steps_work_in_a_new_environment(tmp_path):
    """Every RUN that installs, with the Dockerfile's own words, in a virtual environment of its own: the CPU image,
    because the other one's CUDA libraries are gigabytes."""
    assert len(steps()) == 4
    venv, work = tmp_path / "venv", tmp_path / "opt"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    copied(work, "cpu")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "DEVICE": "cpu",
    }
    for step in steps():
        command = ["bash", "-o", "pipefail", "-c", step]
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, f"{step}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    for extra in ("optuna", "mlflow", "wandb"):
        assert list(venv.glob(f"lib/python3*/site-packages/{extra}")), extra
