"""`ray job submit` against a real head with token authentication, as on a cluster: results, exit codes, stopping,
metrics, logs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from support import ROOT, Head

from fedray.config.read import from_dict, read_config
from fedray.federation.prepare import prepare
from fedray.federation.results import read_rounds
from fedray.federation.run import execute
from fedray.report.metrics import METRICS


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    made = Head(tmp_path_factory.mktemp("head"))
    yield made
    made.close()


@pytest.fixture
def config_file(make_config, tmp_path):
    """A function: sections -> (config file, run directory)."""

    def write(**sections) -> tuple[str, Path]:
        out = tmp_path / "run"
        values = make_config(**sections).model_dump(mode="json", exclude_unset=True) | {
            "engine": "ray",
            "output": {"dir": str(out)},
        }
        values["worker"] = {"cpus": 1, "count": 1} | sections.get("worker", {})
        (tmp_path / "config.yaml").write_text(from_dict(values).to_yaml())
        return str(tmp_path / "config.yaml"), out

    return write


def test_the_upload_is_small_and_holds_what_jobs_need(tmp_path):
    """What Ray itself would pack of this checkout, by .gitignore and .rayignore."""
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "p.zip", include_gitignore=True)
    import zipfile

    names = zipfile.ZipFile(tmp_path / "p.zip").namelist()
    assert (tmp_path / "p.zip").stat().st_size < 5 * 2**20
    assert {
        "fedray/cli.py",
        "jobs/federate.py",
        "jobs/sweep.py",
        "tune_spaces/smoke.py",
        "fedray/assets/builtin-base/config.json",
    } <= set(names)
    assert not [n for n in names if re.search(r"(^|/)(\.git|tests|k8s|runs|\.venv|\.hypothesis)/", n)]


def test_a_submitted_run_ends_with_its_results_and_without_a_token_nobody_gets_in(head, config_file):
    config, out = config_file()
    assert head.get("/api/jobs/", token=False) == 401
    bare = {k: v for k, v in head.env.items() if not k.startswith("RAY_AUTH")} | {"RAY_AUTH_MODE": "disabled"}
    refused = subprocess.run(head.command("true"), env=bare, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode != 0 and "auth" in (refused.stdout + refused.stderr).lower()
    done = head.submit("python", "jobs/federate.py", "--config", config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "round   3" in done.stdout and "succeeded" in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert (
        summary["rounds"] == 3
        and (out / "report.html").is_file()
        and (out / "adapter" / "adapter_model.safetensors").is_file()
    )
    # Actors' lines: run, round and client, in Ray's own log files.
    lines = [
        json.loads(text)
        for file in (head.temp / "session_latest" / "logs").glob("worker-*.err")
        for text in file.read_text().splitlines()
        if text.startswith("{")
    ]
    trained = [line for line in lines if line["event"] == "trained" and line["run"] == "run"]
    assert sorted((line["round"], line["client"]) for line in trained) == [
        (r, f"client-{c}") for r in (1, 2, 3) for c in range(3)
    ]
    assert all(len(line["node"]) == 56 and line["seconds"] > 0 for line in trained)
    done_rounds = [line["round"] for line in lines if line["event"] == "round done" and line["run"] == "run"]
    assert done_rounds == [1, 2, 3]
    told = head.submit("python", "jobs/evaluate.py", str(out), "--json")
    assert told.returncode == 0 and f'"bits_per_byte": {summary["final"]}' in told.stdout, told.stdout


def test_exit_codes_tell_bad_input_from_a_run_that_failed(head, config_file):
    config, out = config_file()
    bad = head.submit("python", "jobs/federate.py", "--config", config, "--federation.cohort", "9")
    assert (
        bad.returncode == 1
        and "failed with exit code 2" in (bad.stdout + bad.stderr)
        and "federation.cohort 9 is more than the 3 clients" in bad.stdout
    )
    assert not out.exists()
    failed = head.submit("python", "jobs/federate.py", "--config", config, "--federation.lr", "1e30")
    assert failed.returncode == 1 and "failed with exit code 1" in (failed.stdout + failed.stderr), failed.stdout
    assert "lower federation.lr" in failed.stdout


@pytest.mark.parametrize(
    "command",
    [
        ["run"],
        ["run", "--output.dir", "runs/mine"],
        ["sweep", "--space", str(ROOT / "tune_spaces/smoke.py")],
        ["compare", "--methods", "ffa", "--out", "runs/mine"],
    ],
)
def test_a_submitted_job_does_not_write_into_its_package_that_ray_removes(command, monkeypatch, tmp_path, capsys):
    from fedray.cli import main

    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    assert (
        main(command) == 2
        and "must be an absolute path on storage that stays" in capsys.readouterr().err
        and not any(tmp_path.iterdir())
    )


def sweep_flags(make_config, folder: Path, axis: str) -> tuple[str, ...]:
    """Flags of a tiny sweep over one axis, whose files are written into the folder; its results go to FOLDER/sweep."""
    (folder / "base.yaml").write_text(
        json.dumps(make_config().model_dump(mode="json", exclude_unset=True, exclude={"output", "worker", "engine"}))
    )
    (folder / "space.py").write_text(
        f"from ray import tune\nfrom fedray.sweep import Sweep\nSWEEP = Sweep(space={{{axis}}}, "
        f"base={{'federation.rounds': 1, 'worker.count': 1}})\n"
    )
    return ("--space", str(folder / "space.py"), "--out", str(folder / "sweep"), "--config", str(folder / "base.yaml"))


def test_a_submitted_sweep_ends_with_its_tables(head, make_config, tmp_path):
    flags = sweep_flags(make_config, tmp_path, "'entry': tune.grid_search(['fedex', 'ffa'])")
    done = head.submit("python", "jobs/sweep.py", *flags, "--federation.rounds", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "sweep" / "summary.json").read_text())["trials"] == {"finished": 2}
    assert "[2/2]" in done.stdout and (tmp_path / "sweep" / "best.yaml").is_file()


def scraped(head: Head) -> dict[str, list[str]]:
    """Samples of every metrics endpoint that the head's service discovery names, by metric."""
    found: dict[str, list[str]] = {}
    discovery = (
        json.loads((head.temp / "prom_metrics_service_discovery.json").read_text())
        if (head.temp / "prom_metrics_service_discovery.json").is_file()
        else []
    )
    for target in {t for group in discovery for t in group["targets"]}:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("ray_fedray"):
                found.setdefault(re.split(r"[{ ]", line, maxsplit=1)[0], []).append(line)
    return found


def dashboard_metrics() -> set[str]:
    """Every name of a metric that the dashboard's queries ask for."""
    text = (ROOT / "k8s" / "monitoring" / "dashboard.json").read_text()
    queries = [target["expr"] for panel in json.loads(text)["panels"] for target in panel.get("targets", [])]
    return {name for query in queries for name in re.findall(r"ray_fedray_\w+", query)}


def gone_on(before: list[dict], after: list[dict]) -> bool:
    """Whether the rounds `before` are the first ones of `after`. A run that starts over takes other times."""
    return [(r["seconds"]["train"], r["metrics"]) for r in before] == [
        (r["seconds"]["train"], r["metrics"]) for r in after[: len(before)]
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
def test_a_stopped_job_leaves_a_checkpoint_that_a_second_one_goes_on_from_and_its_metrics_can_be_scraped(
    private, head, config_file
):
    name = f"to-be-stopped-{private}"
    config, out = config_file(
        federation={"clients": 3, "rounds": 40, "local_steps": 4, "batch_size": 4, "lr": 0.01},
        privacy={"noise": 0.5} if private else {},
        method={"name": "ffa"},
    )
    started = subprocess.run(
        head.command("python", "jobs/federate.py", "--config", config, options=("--no-wait", "--submission-id", name)),
        env=head.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert started.returncode == 0, started.stdout + started.stderr
    wanted = dashboard_metrics()
    made = {f"ray_{n}" for n in METRICS} | {f"ray_{n}_{what}" for n in METRICS for what in ("bucket", "sum", "count")}
    assert wanted <= made
    # Losses of private runs are told to nobody, and other runs have no epsilon.
    expected = wanted - ({"ray_fedray_train_loss"} if private else {"ray_fedray_epsilon"})
    end, seen = time.monotonic() + 150, {}
    while time.monotonic() < end and not expected <= seen.keys():
        time.sleep(1)
        seen = scraped(head) or seen
    assert expected <= seen.keys(), sorted(expected - seen.keys())
    assert not (private and "ray_fedray_train_loss" in seen)
    assert 'run="run"' in seen["ray_fedray_round"][0] and 'method="ffa"' in seen["ray_fedray_round"][0]
    stopped = subprocess.run(
        ["ray", "job", "stop", "--address", head.api, name],
        env=head.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    log = subprocess.run(
        ["ray", "job", "logs", "--address", head.api, name],
        env=head.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    ).stdout
    assert "--output.resume" in log and "goes on from it" in log, log
    before = read_rounds(out)
    assert list((out / "checkpoint").glob("round-*")) and 1 <= len(before) < 40 and not (out / "summary.json").exists()
    again = head.submit(
        "python", "jobs/federate.py", "--config", config, "--output.resume", "--federation.rounds", "40"
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(read_rounds(out)) == 40 and gone_on(before, read_rounds(out))
    alive = subprocess.run(
        ["ray", "list", "actors", "--address", head.api, "--filter", "state=ALIVE"],
        env=head.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "No resource in the cluster" in alive.stdout, alive.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_exit_codes_of_a_submitted_sweep(head, make_config, tmp_path):
    flags = sweep_flags(make_config, tmp_path, "'federation.lr': tune.grid_search([1e30])")
    bad = head.submit("python", "jobs/sweep.py", *flags, "--federation.cohort", "9")
    assert (
        bad.returncode == 1
        and "failed with exit code 2" in (bad.stdout + bad.stderr)
        and "federation.cohort 9 is more than the 3 clients" in bad.stdout
    ), bad.stdout
    assert not (tmp_path / "sweep").exists()
    failed = head.submit("python", "jobs/sweep.py", *flags)
    assert (
        failed.returncode == 1
        and "failed with exit code 1" in (failed.stdout + failed.stderr)
        and "lower federation.lr" in failed.stdout
    ), failed.stdout


#: So many that a quick machine is not done with them before its head is.
ROUNDS = 60


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_head_whose_pod_is_ended_leaves_a_run_that_goes_on_at_another_head(config_file, tmp_path):
    """What kubelet does: SIGTERM to the container's first process, and SIGKILL to all others when that has ended."""
    config, out = config_file(
        federation={"clients": 3, "rounds": ROUNDS, "local_steps": 2, "batch_size": 4, "lr": 0.01},
        privacy={"noise": 0.5},
        method={"name": "ffa"},
    )
    first = Head(tmp_path)
    try:
        words = ("python", "jobs/federate.py", "--config", config, "--output.resume")
        assert (
            subprocess.run(
                first.command(*words, options=("--no-wait",)),
                env=first.env,
                capture_output=True,
                timeout=60,
                check=False,
            ).returncode
            == 0
        )
        end = time.monotonic() + 120
        while len(read_rounds(out)) < 2:
            assert time.monotonic() < end
            time.sleep(0.1)
        first.process.send_signal(signal.SIGTERM)
        first.process.wait(60)
    finally:
        first.close()
    before = read_rounds(out)
    assert 2 <= len(before) < ROUNDS and not (out / "summary.json").exists()
    second = Head(tmp_path)
    try:
        done = second.submit(*words)
    finally:
        second.close()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(read_rounds(out)) == ROUNDS and gone_on(before, read_rounds(out))
    # What was done twice is charged once.
    unbroken = execute(
        prepare(read_config(["--config", config, "--engine", "inline", "--output.dir", str(tmp_path / "unbroken")]))
    )
    assert json.loads((out / "summary.json").read_text())["epsilon"] == unbroken["epsilon"] > 0
