"""Client names and foreign files are others' words: neither a terminal nor a page takes them for its own language."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from support import ROOT, run

from fedray.cli import main
from fedray.report.html import write_report
from fedray.report.terminal import make_console

#: Closes a tag that was never opened (rich raises), opens one, an emoji's code, and what moves a terminal's cursor.
NAMES = ["[/red]x", "[bold]y", ":smile:", "z\x1b[2J"]
SHOWN = ["[/red]x", "[bold]y", ":smile:", "z\\x1b[2J"]
#: Leaves a quoted and an unquoted attribute, and an element.
EVIL = "x onclick=a() \"'><script>a()</script>&lt;"


@pytest.fixture(scope="module")
def odd_names(make_config, tmp_path_factory) -> list[str]:
    """The flags of a run whose clients have such names."""
    root = tmp_path_factory.mktemp("odd")
    rows = [{"text": "a cat sat on the mat", "author": NAMES[i % len(NAMES)]} for i in range(64)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(
        data={"source": str(root / "rows.jsonl"), "partition": "column", "column": "author", "max_length": 24},
        federation={"rounds": 1, "local_steps": 1, "batch_size": 4, "lr": 0.01},
    )
    values = yaml.safe_load(config.to_yaml())
    del values["output"]
    (root / "config.yaml").write_text(yaml.safe_dump(values))
    return ["--config", str(root / "config.yaml")]


def test_a_client_may_be_named_like_markup(odd_names, tmp_path, capsys):
    assert main(["run", *odd_names, "--output.dir", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SHOWN) and "\x1b" not in said


def test_a_table_shows_a_name_as_it_is(odd_names, capsys):
    assert main(["plan", *odd_names, "--privacy.noise", "1", "--privacy.delta", "1e-3"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in SHOWN) and "\x1b" not in said


def test_a_progress_bar_shows_its_words_as_they_are(capsys):
    from fedray.report.console import ConsoleListener

    listener = ConsoleListener(make_console())
    task = listener.progress_bar.add_task("[/red]x", total=1)
    listener.progress_bar.console.print(listener.progress_bar.get_renderable())
    assert "[/red]x" in capsys.readouterr().out and task == 0


def test_one_place_makes_every_console():
    makers = re.compile(r"\bConsole\(|from_markup\(|rich\.print|markup=True|rich\.markup")
    sources = [*(ROOT / "fedray").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]
    assert len(sources) > 100 and [str(f) for f in sources if makers.search(f.read_text())] == []


class Parts(HTMLParser):
    """Which elements a page has, with which attributes, and which classes."""

    def __init__(self, page: str):
        super().__init__()
        self.there: set[tuple[str, ...]] = set()
        self.classes: set[str | None] = set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.there |= {(tag,), *((tag, name) for name, _ in attrs)}
        self.classes |= {value for name, value in attrs if name == "class"}


def poisoned(value):
    """The same, every string of it replaced; keys, numbers and shape as they were."""
    if isinstance(value, dict):
        return {key: poisoned(v) for key, v in value.items()}
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return EVIL if isinstance(value, str) else value


@pytest.fixture(scope="module")
def private_run(make_config) -> Path:
    return run(make_config(method__name="ffa", privacy={"epsilon": 4.0}, federation__rounds=1))


def foreign(private: Path, folder: Path, change, void: bool) -> Parts:
    """The page of a copy of the run that `change` has been over, strings where a page shows numbers included."""
    folder.mkdir()
    (folder / "config.yaml").write_text((private / "config.yaml").read_text() + f"# {change('x')}\n")
    told = change(json.loads((private / "privacy.json").read_text()))
    told["guarantee"] |= {"epsilon_by_client": {change("x"): 4.0}} | ({} if void else {"void": None, "epsilon": 4.0})
    told["plans"] = {change("x"): next(iter(told["plans"].values()))}
    (folder / "privacy.json").write_text(json.dumps(told))
    summary = change(json.loads((private / "summary.json").read_text())) | {"metric": "bits_per_byte"}
    summary |= {"rounds": change("1"), "clients": change("3"), "final_by_group": {change("x"): 1.0}}
    (folder / "summary.json").write_text(json.dumps(summary))
    record = json.loads((private / "rounds.jsonl").read_text())
    record |= {"cohort": [change("x")], "dropped": [{"client": change("x"), "reason": change("x")}]}
    (folder / "rounds.jsonl").write_text(json.dumps(record) + "\n")
    return Parts(write_report(folder).read_text())


@pytest.mark.parametrize("void", [True, False])
def test_a_page_escapes_every_string_of_a_foreign_run(private_run, tmp_path, void):
    plain = foreign(private_run, tmp_path / "plain", lambda value: value, void)
    evil = foreign(private_run, tmp_path / f"run {EVIL.replace('/', '')}", poisoned, void)
    assert evil.there <= plain.there and ("table",) in evil.there
    assert evil.classes <= plain.classes
