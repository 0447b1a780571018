"""Event files, traces, metrics' names: what a run tells those who watch it. Prometheus: tests/jobs/test_jobs.py."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from fedray.config.read import from_dict, read_config
from fedray.errors import ConfigError
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.report.metrics import METRICS, RayMetrics
from fedray.report.track import Several, TensorBoard, flat, numbers, trackers


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the one event file (TFRecord: length, its checksum, the event, its checksum)."""
    (file,) = folder.glob("events.out.tfevents.*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_tensorboard_holds_every_rounds_numbers_once_after_a_resume_too(make_config, tmp_path):
    config = make_config(
        output={"dir": str(tmp_path / "run")},
        federation={"clients": 3, "rounds": 2, "local_steps": 1, "batch_size": 4, "lr": 0.01},
    )

    def run(config):
        tracked = trackers(config)
        summary = execute(prepare(config), Several(tracked))
        for tracker in tracked:
            tracker.close(True)
        return summary

    run(config)
    resumed = config.model_copy(update={"output": config.output.model_copy(update={"resume": True})})
    summary = run(resumed)
    found = scalars(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["metrics/bits_per_byte"]] == [0, 1, 2]
    assert found["metrics/bits_per_byte"][-1][1] == pytest.approx(summary["final"]) and found["train_loss"][0][0] == 1
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [v for _, v in found["bytes_up"]] == [r["bytes_up"] for r in records]


def test_trackers_are_asked_for_by_name_and_one_that_is_missing_is_named(monkeypatch):
    assert (
        read_config(["--output.track", "null"]).output.track == ()
        and trackers(read_config(["--output.track", "null"])) == []
    )
    assert read_config(["--output.track", "tensorboard,mlflow"]).output.track == ("tensorboard", "mlflow")
    with pytest.raises(ConfigError, match="output.track"):
        read_config(["--output.track", "paper"])
    import builtins

    real = builtins.__import__
    monkeypatch.setattr(
        builtins,
        "__import__",
        lambda name, *more: (
            real(name, *more) if name not in ("mlflow", "wandb") else (_ for _ in ()).throw(ImportError(name))
        ),
    )
    for name in ("mlflow", "wandb"):
        with pytest.raises(ConfigError, match=r"pip install 'fedray\[track\]'"):
            trackers(read_config(["--output.track", name]))


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_other_trackers_get_the_same_numbers(name, make_config, tmp_path, monkeypatch):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'fedray[track]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = make_config(output={"dir": str(tmp_path / "run"), "track": [name]})
    (tracker,) = tracked = trackers(config)
    execute(prepare(config), Several(tracked))
    tracker.close(True)
    if name == "wandb":
        assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
        return
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("fedray").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["method.name"] == "fedex"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "metrics/bits_per_byte")] == [0, 1, 2, 3]


def test_a_tracker_whose_server_is_gone_does_not_cost_the_run(make_config):
    class Gone(TensorBoard):
        def log(self, round, values):
            if round == 2:
                raise ConnectionError("no route to host")
            super().log(round, values)

    (tracker,) = tracked = [Gone()]
    assert execute(prepare(make_config()), Several(tracked))["rounds"] == 3
    assert tracker.broken == "Gone was told nothing from round 2 on: ConnectionError: no route to host"
    tracker.close(True)


def test_numbers_are_plain_and_of_private_runs_hold_no_loss():
    record = {
        "round": 3,
        "cohort": ["a"],
        "dropped": [{"client": "b", "reason": "late"}],
        "train_loss": None,
        "metrics": {"accuracy": 0.5},
        "bytes_up": 8,
        "bytes_down": 4,
        "aggregation_error": 0.1,
        "exactness": 1e-8,
        "seconds": {"train": 2.0},
        "epsilon": {"a": 1.5, "b": 1.25},
    }
    told = numbers(record)
    assert told == {
        "metrics/accuracy": 0.5,
        "exactness": 1e-8,
        "aggregation_error": 0.1,
        "bytes_up": 8.0,
        "bytes_down": 4.0,
        "seconds/train": 2.0,
        "epsilon": 1.5,
        "dropped": 1.0,
    }
    assert flat({"a": {"b": 1, "c": None}, "d": "x"}) == {"a.b": 1, "d": "x"}


def test_one_clients_round_can_be_profiled(make_config, tmp_path):
    config = make_config(output={"dir": str(tmp_path / "run")}, worker={"cpus": 1, "profile": "client-1:2"})
    calm = execute(prepare(make_config()))
    assert execute(prepare(config))["final"] == calm["final"]  # looking changes nothing
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "client-1-round-2.json.gz"
    names = {e.get("name") for e in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
    for wrong in ("client-7:1", "client-1:9"):
        with pytest.raises(ConfigError, match="is no client and round of this run"):
            prepare(make_config(worker={"cpus": 1, "profile": wrong}))
    with pytest.raises(ConfigError, match="leave it out in a private run"):
        from_dict({"worker": {"profile": "client-1:1"}, "privacy": {"epsilon": 1.0}})


def test_metrics_take_every_record_of_a_run(make_config, monkeypatch):
    kept: dict[str, list] = {}

    class Fake:
        def __init__(self, name, description, tag_keys, boundaries=None):
            self.name, self.keys = name, set(tag_keys)

        def _note(self, value, tags):
            assert set(tags) == self.keys and all(isinstance(v, str) for v in tags.values())
            kept.setdefault(self.name, []).append(value)

        set = inc = observe = _note

    monkeypatch.setattr("fedray.report.metrics.METRICS", {n: (Fake, w, t) for n, (_, w, t) in METRICS.items()})
    monkeypatch.setattr("fedray.report.metrics.Histogram", None)
    config = make_config(privacy={"noise": 0.5}, method={"name": "ffa"})
    summary = execute(prepare(config), RayMetrics())
    assert kept["fedray_round"] == [0, 1, 2, 3] and kept["fedray_epsilon"][-1] == pytest.approx(summary["epsilon"])
    assert sum(kept["fedray_bytes_total"]) == summary["bytes_up"] + summary["bytes_down"]
    assert "fedray_train_loss" not in kept and kept["fedray_dropped_clients"] == [0, 0, 0]  # private
    assert kept["fedray_metric"] and kept["fedray_phase_seconds"]


def test_who_took_part_in_a_round_of_client_level_privacy_is_told_to_nobody(
    make_config, monkeypatch, ray_session, tmp_path
):
    """On Ray, where actors log: a sample that is a secret stays one."""
    told = {}
    monkeypatch.setattr(RayMetrics, "_set", lambda self, metric, value, /, **tags: told.setdefault(metric, value))
    config = make_config(
        engine="ray",
        worker={"cpus": 1, "count": 1},
        privacy={"noise": 2.0, "unit": "client"},
        method={"name": "ffa"},
        output={"dir": str(tmp_path / "secret")},
    )
    assert execute(prepare(config), RayMetrics())["rounds"] == 3
    assert "fedray_round" in told and not {"fedray_clients", "fedray_dropped_clients"} & told.keys()
    logs = Path(ray_session._private.worker._global_node.get_session_dir_path()) / "logs"
    lines = [
        json.loads(text)
        for file in logs.glob("worker-*.err")
        for text in file.read_text(errors="replace").splitlines()
        if text.startswith("{") and '"run": "secret"' in text
    ]
    assert [line["round"] for line in lines if line["event"] == "round done"] == [1, 2, 3]
    assert not any({"client", "clients", "dropped"} & line.keys() for line in lines)
