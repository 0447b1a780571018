"""The command line. Bad input: one sentence on standard error and exit code 2. A failed run: one sentence and 1.
Ctrl-C: 130, SIGTERM: 143."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import fedray
from fedray.argv import split, words
from fedray.errors import ConfigError, FedrayError
from fedray.report.terminal import make_console
from fedray.stopping import Terminated, stop_on_sigterm

if TYPE_CHECKING:  # at run time each command imports what it needs: `fedray --help` then answers at once
    from rich.console import Console
    from rich.table import Table

    from fedray.config.sections import Config
    from fedray.plan import Plan

_USAGE = """fedray: exact, private, federated low-rank fine-tuning of language models

  fedray run      [--config F.yaml] [--section.key value ...]   one federated run; no arguments: the built-in demo
  fedray plan     the same arguments [--json]                   what it would cost, before it runs
  fedray holdings [--out FILE.png] the same arguments           who holds what: rows and labels of each client, as \
a table and a picture
  fedray methods                                                adapters and methods: what fits, what is exact
  fedray compare  [--methods a,b] [--seeds 0,1,2] [--lrs 1e-3,3e-3,1e-2] [--out DIR] [--jobs N] \
[--section.key value ...]
                                                                several methods and seeds, tuned \
alike: one table, one picture
                  --methods: [ADAPTER+]METHOD[@RANK],...; --lrs.ENTRY: an entry's own grid; \
--set.ENTRY key=value,...: its own options
  fedray sweep    --space tune_spaces/X.py [--out DIR] [--resume] [--seeds 0,1] [--samples N] \
[--max-concurrent N] [--track mlflow,wandb]
                  [--section.key value ...]                     many runs under Ray Tune: tables, \
Pareto fronts, what mattered, best.yaml
  fedray evaluate RUN_DIR [--json]                              held-out metrics of a run's last state
                  [--tasks arc_easy,... [--limit N] [--tasks-from DIR]]  or lm-evaluation-harness's, of its adapter
  fedray report   RUN_DIR                                       write report.html again, of an \
unfinished run too; or a sweep's tables and pictures
  fedray forget   RUN_DIR                                       remove this machine's noise keys of \
a private run that will not go on
  fedray identity --client NAME [--key_dir DIR]                 draw this machine's key of a client, and print its \
line of privacy.identities
  fedray audit    [--canaries N] [--config F.yaml] [--section.key value ...]
                                                                a run with canaries: the epsilon that they prove \
beside the one that is claimed
  fedray threats                                                who learns what, in each mode
  fedray schema                                                 the config's JSON schema, for editors
  fedray export   RUN_DIR OUT --format lora|peft|merged|gguf    write its result, with a card, for others to load
                  [--max-rank Q] [--push OWNER/NAME [--private]]  at one rank (vLLM, llama.cpp); to the hub
  fedray run --help                                             every key, its default and what it means
"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the `fedray` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # In a file or a pipe a table keeps its columns.
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 170
    console = make_console(width=wide)
    _quiet()
    if not argv or argv[0] in ("-h", "--help"):
        console.print(_USAGE)
        return 0
    if argv[0] in ("-V", "--version"):
        console.print(f"fedray {fedray.__version__}")
        return 0
    return _guarded(argv[0], argv[1:], console)


def _guarded(name: str, argv: list[str], console: Console) -> int:
    """`_command`, where whatever goes wrong is told in one sentence, and is the exit code."""
    errors = make_console(stderr=True)
    try:
        return _command(name, argv, console)
    except FedrayError as error:
        errors.print(f"fedray: {error}", style="red", soft_wrap=True)
        if details := getattr(error, "details", ""):
            errors.print(details, style="dim", soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        errors.print(
            "fedray: stopped; the last finished round is kept, "
            "and --output.resume (of a sweep --resume) goes on from it"
        )
        return 143 if isinstance(stopped, Terminated) else 130


def _command(name: str, argv: list[str], console: Console) -> int:
    """Do it, or say how; the exit code."""
    if name not in _COMMANDS:
        raise ConfigError(f"unknown command '{name}': choose {', '.join(_COMMANDS)}")
    if "--help" in argv or "-h" in argv:
        _help(console)
        return 0
    stop_on_sigterm()
    return _COMMANDS[name](argv, console)


def _quiet() -> None:
    """Library chatter that a person cannot act on."""
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("DeepSpeed", "bitsandbytes", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # its errors are raised too, and told in one sentence


def _help(console: Console) -> None:
    from fedray.config.read import help_groups

    console.print(_USAGE, end="")
    for group, lines in help_groups():
        console.print(f"\n  {group}:" if group else "")
        for key, default, doc in lines:
            console.print(f"  --{key:34} {doc}{f' [{default}]' if default else ''}", soft_wrap=True)


def _run(argv: list[str], console: Console) -> int:
    from fedray.config.read import read_config
    from fedray.federation.folder import check_lasting
    from fedray.federation.prepare import prepare
    from fedray.federation.run import execute
    from fedray.report.console import ConsoleListener
    from fedray.report.html import write_report
    from fedray.report.metrics import RayMetrics
    from fedray.report.track import Several, trackers

    config = read_config(argv)
    check_lasting("output.dir", config.output.dir)
    prepared = prepare(config)
    listener, tracked = ConsoleListener(console), trackers(prepared.config)
    measured = [RayMetrics()] if prepared.config.engine == "ray" else []
    summary = None
    try:
        summary = execute(prepared, Several([listener, *tracked, *measured]))
    finally:
        listener.close()
        for tracker in tracked:
            tracker.close(summary is not None)
            if tracker.broken:
                console.print(f"note     {tracker.broken}", soft_wrap=True)
    write_report(prepared.folder)
    listener.finished(summary, str(prepared.folder))
    return 0


def _plan(argv: list[str], console: Console) -> int:
    from fedray.config.read import read_config
    from fedray.report.plan import print_plan
    from fedray.training.outline import shape_names

    as_json, argv = _json_asked(argv)
    config = read_config(argv)
    make = _plan_of_shape if config.model.path in shape_names() else _plan_of_run
    costs, placement, note = make(config)
    if as_json:
        print(json.dumps(costs.to_json() | {"placement": placement}, indent=2))
        return 0
    if note:
        console.print(note)
    print_plan(console, costs, placement)
    return 0


def _plan_of_shape(config: Config) -> tuple[Plan, None, str | None]:
    """What a model that is known by its shape alone would cost, and what cannot be known without data."""
    from fedray.plan import plan

    note = (
        "privacy  needs the clients' numbers of examples: "
        "give model.path a model and data.source the data to see noise and epsilon"
    )
    return plan(config), None, note if config.privacy.on else None


def _plan_of_run(config: Config) -> tuple[Plan, str, str | None]:
    """What a run would cost, where its workers would be, and what cannot be known yet."""
    from fedray.federation.prepare import prepare
    from fedray.plan import plan
    from fedray.report.plan import UNKNOWN_COUNTS

    prepared, private = prepare(config), config.privacy.on
    units = prepared.units() if private else None
    costs = plan(config, prepared.cohort, len(prepared.data.classes) or 2, units)
    return costs, prepared.placement.reason, UNKNOWN_COUNTS if private and config.siloed else None


def _holdings(argv: list[str], console: Console) -> int:
    from fedray.config.read import read_config
    from fedray.report.holdings import holdings, table_of, write_picture

    own, argv = split(argv, lambda name: name == "out")
    found = holdings(read_config(argv))
    console.print(table_of(found))
    if "out" in own:
        console.print(f"picture in {write_picture(found, own['out'])}")
    return 0


def _schema(argv: list[str], console: Console) -> int:
    from fedray.config.schema import schema

    if argv:
        raise ConfigError(f"fedray schema takes nothing, not '{argv[0]}'")
    print(json.dumps(schema(), indent=2))
    return 0


def _json_asked(argv: list[str]) -> tuple[bool, list[str]]:
    """Whether --json is among the words, and the others."""
    return "--json" in argv, [word for word in argv if word != "--json"]


def _methods(argv: list[str], console: Console) -> int:
    if argv == ["--markdown"]:
        print(_methods_in_markdown())
        return 0
    if argv:
        raise ConfigError(f"fedray methods takes nothing but --markdown, not '{argv[0]}'")
    console.print(_methods_table())
    console.print("why not")
    for line in _misfits():
        console.print(line, soft_wrap=True)
    return 0


def _audit(argv: list[str], console: Console) -> int:
    import tempfile

    from fedray.audit import audit_run
    from fedray.config.read import read_config
    from fedray.report.audit import print_audit

    given, rest = split(argv, lambda name: name == "canaries")
    canaries = given.get("canaries", "400")
    if not canaries.isdecimal() or int(canaries) < 1:
        raise ConfigError(f"--canaries {canaries} is no number of canaries")
    config = read_config(rest)
    with tempfile.TemporaryDirectory(prefix="fedray-audit-") as folder:
        found = audit_run(config, int(canaries), Path(folder) / "run", lambda line: console.print(line))
    print_audit(console, found, int(canaries))
    return 0 if found.holds else 1


def _threats(argv: list[str], console: Console) -> int:
    from fedray.federation.channels.threats import markdown
    from fedray.report.threats import print_threats

    if argv == ["--markdown"]:
        print(markdown())
        return 0
    if argv:
        raise ConfigError("fedray threats takes nothing, or --markdown")
    print_threats(console)
    return 0


def _methods_in_markdown() -> str:
    from fedray.adapters import ADAPTERS
    from fedray.methods import METHODS

    head = "| method | " + " | ".join(ADAPTERS) + " | exact |\n|" + "---|" * (len(ADAPTERS) + 2)
    fits = {name: ["yes" if kind in method.adapters else "" for kind in ADAPTERS] for name, method in METHODS.items()}
    rows = [f"| `{name}` | {' | '.join(fits[name])} | {method.exact} |" for name, method in METHODS.items()]
    return "\n".join([head, *rows])


def _methods_table() -> Table:
    from rich.table import Table

    from fedray.adapters import ADAPTERS
    from fedray.methods import METHODS

    table = Table()
    for column in ("method", *ADAPTERS, "exact", "what it does"):
        table.add_column(column)
    for name, method in METHODS.items():
        fits = ["yes" if kind in method.adapters else "no" for kind in ADAPTERS]
        first_paragraph = " ".join((method.__doc__ or "").split("\n\n")[0].split())
        table.add_row(name, *fits, method.exact, first_paragraph)
    return table


def _misfits() -> Iterator[str]:
    """Why each pair that does not fit does not."""
    from fedray.adapters import ADAPTERS
    from fedray.methods import METHODS, why_not

    for name in METHODS:
        for kind in ADAPTERS:
            if reason := why_not(name, kind):
                yield f"  {name} with {kind}: {reason}"


def _compare(argv: list[str], console: Console) -> int:
    from fedray.compare import compare
    from fedray.report.comparison import print_comparison

    results, out = compare(argv, lambda line: console.print(line, soft_wrap=True))
    print_comparison(console, results)
    console.print(f"written to {out}: compare.json, compare.csv, compare.png", soft_wrap=True)
    return 0


def _sweep(argv: list[str], console: Console) -> int:
    from fedray.report.live import LiveTable
    from fedray.report.sweep import write_sweep
    from fedray.report.sweep.summary import print_sweep
    from fedray.sweep.run import read_sweep, run_sweep

    out = run_sweep(
        read_sweep(argv),
        lambda count, maximise: LiveTable(console, count, maximise),
        lambda line: console.print(line, soft_wrap=True),
    )
    summary = write_sweep(out)
    print_sweep(console, out, summary)
    return 0 if summary["best"] is not None else 1


def _evaluate(argv: list[str], console: Console) -> int:
    from fedray.federation.results import evaluate

    as_json, rest = _json_asked(argv)
    flags, names = split(rest, lambda name: name in ("tasks", "tasks-from", "limit"))
    if len(names) != 1:
        raise ConfigError("fedray evaluate takes one run directory")
    if flags:
        return _harness(Path(names[0]), flags, as_json, console)
    result = evaluate(Path(names[0]))
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    console.print(f"after round {result['round']}: {_metrics(result['metrics'])}")
    for group, metrics in result["groups"].items():
        console.print(f"  {group}: {_metrics(metrics)}")
    return 0


def _harness(folder: Path, flags: dict[str, str], as_json: bool, console: Console) -> int:
    from fedray.federation.harness import harness

    limit = flags.get("limit")
    if "tasks" not in flags or not (limit is None or limit.isdecimal()):
        raise ConfigError(
            "fedray evaluate RUN_DIR --tasks arc_easy,boolq takes --limit N and --tasks-from DIR beside it"
        )
    include = Path(flags["tasks-from"]) if "tasks-from" in flags else None
    result = harness(folder, flags["tasks"].split(","), int(limit) if limit else None, include)
    if as_json:
        print(json.dumps(result, indent=2))
        return 0
    for task, metrics in result.items():
        console.print(f"{task}: {_metrics(metrics)}", soft_wrap=True)
    return 0


def _metrics(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _export(argv: list[str], console: Console) -> int:
    from fedray.federation.exports import FORMATS, Form, export, push

    if words(argv)[-1:] == ["--format"]:
        raise ConfigError(f"--format needs one of {', '.join(FORMATS)}")
    flags, places = split(argv, lambda name: name in ("format", "max-rank", "push"), switches=("private",))
    if len(places) != 2 or any(place.startswith("--") for place in places):
        raise ConfigError(
            "fedray export takes a run directory and a place to write to: fedray export RUN_DIR OUT --format peft"
        )
    if "private" in flags and "push" not in flags:
        raise ConfigError("--private is of the repository that --push OWNER/NAME makes: give that too")
    out, most = Path(places[1]), flags.get("max-rank")
    if most is not None and not most.isdecimal():
        raise ConfigError(f"--max-rank '{most}' is no rank: give 1 or more")
    form = Form(flags.get("format", "peft"), int(most) if most else None, public="push" in flags)
    for sentence in export(Path(places[0]), out, form):
        console.print(sentence, soft_wrap=True)
    console.print(f"written to {places[1]}")
    if "push" in flags:
        console.print(f"sent to {push(out, flags['push'], 'private' in flags)}", soft_wrap=True)
    return 0


def _forget(argv: list[str], console: Console) -> int:
    from fedray.federation.channels.accounted import forget
    from fedray.federation.results import read_run_config

    folder = _run_directory("forget", argv)
    removed = forget(read_run_config(folder), folder)
    console.print(
        f"{removed} noise key{'s' if removed != 1 else ''} removed from this machine; "
        "the run cannot go on with the same noise",
        soft_wrap=True,
    )
    return 0


def _identity(argv: list[str], console: Console) -> int:
    from fedray.privacy.keys import KeyStore
    from fedray.privacy.sums.identity import identity_command

    given, rest = split(argv, lambda name: name in ("client", "key_dir"))
    if rest or "client" not in given:
        raise ConfigError("fedray identity takes --client NAME, and --key_dir DIR where privacy.key_dir is set")
    print(identity_command(given["client"], KeyStore(given.get("key_dir")).folder))
    return 0


def _report(argv: list[str], console: Console) -> int:
    folder = _run_directory("report", argv)
    if (folder / "sweep.json").is_file():
        from fedray.report.sweep import write_sweep
        from fedray.report.sweep.summary import print_sweep

        print_sweep(console, folder, write_sweep(folder))
    else:
        from fedray.report.html import write_report

        console.print(f"written to {write_report(folder)}", soft_wrap=True)
    return 0


def _run_directory(command: str, argv: list[str]) -> Path:
    """The only word of a command. Raises ConfigError for anything else."""
    if len(argv) != 1 or argv[0].startswith("--"):
        raise ConfigError(f"fedray {command} takes one run directory")
    return Path(argv[0])


_COMMANDS = {
    "run": _run,
    "plan": _plan,
    "methods": _methods,
    "compare": _compare,
    "sweep": _sweep,
    "evaluate": _evaluate,
    "export": _export,
    "report": _report,
    "forget": _forget,
    "audit": _audit,
    "identity": _identity,
    "threats": _threats,
    "schema": _schema,
    "holdings": _holdings,
}

if __name__ == "__main__":
    sys.exit(main())
