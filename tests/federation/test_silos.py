"""Clients that are kept to their own nodes: who may read what, and where it runs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT

from fedray.config.read import from_dict, read_config
from fedray.data.partition import load_data
from fedray.errors import ConfigError
from fedray.federation.folder import differences
from fedray.federation.placement import Node, matches, place_apart
from fedray.federation.pool_ray import RayPool


def siloed(silos: dict[str, str], **sections) -> dict:
    """Values of a config: clients by name with the silo they belong to."""
    clients = {
        name: {"source": f"/data/{name}/train.csv", "node_labels": {"silo": silo}} for name, silo in silos.items()
    }
    return {
        "clients": clients,
        "data": {"source": "/data/test", "label": "label"},
        "model": {"path": "m", "task": "classification"},
    } | sections


def node(silo: str | None = None, cpus: float = 4.0, gpus: float = 0.0) -> Node:
    return Node({"CPU": cpus, "GPU": gpus, "memory": 1e9}, {"ray.io/node-id": "x"} | ({"silo": silo} if silo else {}))


# --- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["clients"]["b"].pop("node_labels"), "clients.b has no node_labels, while others have"),
        (
            lambda c: [client.pop("source") for client in c["clients"].values()],
            "clients.a.node_labels without clients.a.source",
        ),
        (lambda c: c["clients"]["a"].update(source="data/a.csv"), "give its absolute path there"),
        (lambda c: c.update(engine="inline"), "need engine ray"),
        (lambda c: c["clients"]["a"].update(node_labels={}), "node_labels"),
        (lambda c: c.update(privacy={"epsilon": 2.0, "sweep_epsilon": 9.0}), "clients with node_labels keep them"),
    ],
)
def test_what_could_not_be_kept_to_its_nodes_is_refused(change, words):
    values = siloed({"a": "x", "b": "y"})
    change(values)
    with pytest.raises(ConfigError, match=words):
        from_dict(values)


def test_labels_on_the_command_line():
    flags = (
        "--clients.ward.7.source /d/7.csv --clients.ward.7.node_labels silo=a,zone=in(x,y) --data.source /d "
        "--model.task classification --model.path m"
    )
    assert read_config(flags.split()).clients["ward.7"].node_labels == {"silo": "a", "zone": "in(x,y)"}
    with pytest.raises(ConfigError, match="'silo' is no KEY=VALUE"):
        read_config(flags.replace("silo=a", "silo").split())


def placed(config, nodes):
    return place_apart(config, nodes, list(config.clients))


# --- placement ------------------------------------------------------------------------------------------------------


def test_labels_match_as_ray_matches_them():
    there = {"silo": "a", "zone": "x"}
    assert (
        matches({"silo": "a"}, there)
        and matches({"silo": "in(a,b)", "zone": "!y"}, there)
        and matches({"rack": "!7"}, there)
    )
    assert (
        not matches({"silo": "b"}, there)
        and not matches({"silo": "!in(a, b)"}, there)
        and not matches({"rack": "7"}, there)
    )


def test_every_place_gets_workers_of_its_own():
    config = from_dict(siloed({"a1": "a", "b1": "b", "a2": "a"}))
    found = placed(config, [node(), node("a"), node("b", 2.0)])
    assert [(h.labels["silo"], h.clients) for h in found.homes] == [("a", ("a1", "a2"))] * 2 + [("b", ("b1",))]
    assert found.workers == 3 and found.cpus == 2 and found.device == "cpu"  # the largest share that costs no worker
    assert "a1, a2 on silo=a; b1 on silo=b" in found.reason
    one = placed(from_dict(siloed({"a1": "a", "a2": "a"}, worker={"count": 1})), [node("a")])
    assert one.workers == 1 and one.homes[0].clients == ("a1", "a2") and one.cpus == 4
    small = placed(config, [node("a", 1.0), node("b", 1.0)])  # as many as fit: the two of a take turns
    assert [h.labels["silo"] for h in small.homes] == ["a", "b"]
    gpus = placed(config, [node("a", gpus=2.0), node("b", gpus=1.0)])
    assert gpus.gpus == 1.0 and gpus.workers == 3
    # Two labels, one node: its room is not given away twice.
    both = from_dict(siloed({"a": "in(x,y)", "b": "x"}, worker={"cpus": 3}))
    with pytest.raises(
        ConfigError, match="1 worker of 3 CPUs for b do not fit on the nodes with silo=x, where 1 CPUs are left"
    ):
        placed(both, [node("x")])
    assert [h.clients for h in placed(both, [node("x"), node("y")]).homes] == [
        ("a",),
        ("b",),
    ]  # b, which has no choice, is placed first


def test_labels_that_no_node_has_are_refused_before_anything_starts():
    config = from_dict(siloed({"a": "a", "b": "b"}))
    with pytest.raises(
        ConfigError, match=r"no node has the labels silo=b that clients.b.node_labels asks for \(there are silo=a\)"
    ):
        placed(config, [node(), node("a")])
    with pytest.raises(ConfigError, match="1 node without labels"):
        placed(config, [node()])
    with pytest.raises(ConfigError, match="4 workers of 1 GPU and 1 CPU|2 workers of 1 GPU"):
        placed(from_dict(siloed({"a": "a", "b": "a"}, worker={"count": 2, "gpus": 1})), [node("a", gpus=1.0)])
    waits = placed(from_dict(siloed({"a": "a", "b": "b"}, worker={"wait": 60, "gpus": 1, "count": 1})), [node()])
    assert waits.workers == 2 and waits.gpus == 1


def test_a_worker_gets_no_client_of_another_place():
    config = from_dict(siloed({"a1": "a", "b1": "b", "a2": "a"}))
    own = RayPool(["w0", "w1", "w2"], ["a1", "b1", "a2"], homes=placed(config, [node("a"), node("b")]).homes)
    assert own.workers._owner == {"a1": 0, "a2": 1, "b1": 2}
    shared = RayPool(["w0", "w1"], ["a1", "b1", "a2"], homes=placed(config, [node("a", 1.0), node("b", 1.0)]).homes)
    assert shared.workers._owner == {} and shared.workers._serves == [("a1", "a2"), ("b1",)]


def test_a_run_may_go_on_in_another_place_but_not_with_other_data():
    values = siloed({"a": "x", "b": "y"})
    old = from_dict(values)
    moved = from_dict(json.loads(json.dumps(values).replace('"silo": "y"', '"silo": "z"')))
    assert differences(old, moved) is None
    wider = json.loads(json.dumps(values))
    wider["clients"]["b"] |= {"ranks": 2, "gpus": 1, "zero_stage": 3}
    assert differences(old, from_dict(wider)) is None
    other = from_dict(json.loads(json.dumps(values).replace("/data/b/", "/data/c/")))
    assert differences(old, other) == ("clients.b.source", "/data/b/train.csv", "/data/c/train.csv")


# --- data -----------------------------------------------------------------------------------------------------------


def write_silos(root: Path, labels: dict[str, str]) -> dict:
    """A folder a client, and held-out examples for all; the values of a config over them."""
    for i, name in enumerate([*labels, "test"]):
        (root / name).mkdir(parents=True)
        with (root / name / f"{'test' if name == 'test' else 'train'}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["sentence", "label"])
            rows.writerows([[f"{'good' if k % 2 else 'bad'} word {i} {k}", k % 2] for k in range(24)])
    values = siloed(labels)
    values["data"]["source"] = str(root / "test")
    for name in labels:
        values["clients"][name]["source"] = str(root / name)
    return values


def test_only_what_may_be_read_is_read(tmp_path, monkeypatch):
    values = write_silos(tmp_path, {"a": "x", "b": "y"})
    (tmp_path / "b" / "train.csv").unlink()  # whoever reads it fails
    config = from_dict(values)
    nothing, one = load_data(config), load_data(config, ["a"])
    assert (
        nothing.clients == one.clients == ["a", "b"]
        and nothing.train == {}
        and list(one.train) == ["a"]
        and len(one.train["a"]) == 24
    )
    assert nothing.classes == one.classes == (0, 1) and nothing.text == one.text == "sentence"
    with pytest.raises(ConfigError, match="holds no train"):
        load_data(config, ["b"])
    with (tmp_path / "a" / "train.csv").open("a") as file:
        file.write("odd,7\n")
    with pytest.raises(ConfigError, match="of client 'a' holds the value 7 that the held-out data have not"):
        load_data(config, ["a"])
    with pytest.raises(ConfigError, match="of client 'a' holds a value that"):  # private data are not quoted
        load_data(from_dict(values | {"privacy": {"epsilon": 1.0}}), ["a"])


CLUSTER = """
import json, os, signal, subprocess, sys, threading
LOG = sys.argv[1]

def watch():
    # Which process of which node opens a client's file.
    import ray
    def hook(event, args):
        path = str(args[0]) if event == "open" else ""
        if ("/silos/" in path and path.endswith("train.csv")) or path.endswith(".rounds.jsonl.part"):
            with os.fdopen(os.open(LOG, os.O_APPEND | os.O_CREAT | os.O_WRONLY), "a") as file:
                file.write(json.dumps([os.environ.get("TEST_NODE", "driver"), path]) + chr(10))
    sys.addaudithook(hook)

import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "env_vars": {"TEST_NODE": "head"}})
for name in ("x", "y"):
    variables = {"TEST_NODE": name, "HF_DATASETS_CACHE": f"{os.path.dirname(LOG)}/cache-{name}"}
    cluster.add_node(num_cpus=2, labels={"silo": name}, env_vars=variables)
os.environ["HF_DATASETS_CACHE"] = f"{os.path.dirname(LOG)}/cache-driver"
watch()
hook = {"worker_process_setup_hook": watch}
ray.init(address=cluster.address, runtime_env=hook, log_to_driver=False, logging_level="ERROR")
from fedray.cli import main
codes = []
for command in json.loads(sys.argv[2]):
    if "silo=late" in command:  # what an autoscaler does
        later = os.environ | {"TEST_NODE": "late", "HF_DATASETS_CACHE": f"{os.path.dirname(LOG)}/cache-late"}
        command_line = [f"{os.path.dirname(sys.executable)}/ray", "start", f"--address={cluster.address}"]
        command_line += ["--num-cpus=1", "--labels=silo=late", "--block"]
        late, options = [], dict(env=later, stdout=subprocess.DEVNULL, start_new_session=True)
        threading.Timer(6, lambda: late.append(subprocess.Popen(command_line, **options))).start()
    try:
        codes.append(main(command))
    except SystemExit as error:
        codes.append(error.code)
states = sorted({a["State"] for a in ray._private.state.actors().values()})
print("CODES", json.dumps(codes), "STATES", json.dumps(states), flush=True)
ray.shutdown()
for node in late:
    os.killpg(node.pid, signal.SIGKILL)
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def cluster_run(tiny, tmp_path_factory):
    """Runs on a cluster of a head without a silo and one node for each of two: (exit codes, standard error, who opened
    what, folder)."""
    root = tmp_path_factory.mktemp("cluster")
    values = write_silos(root / "silos", {"a1": "x", "b1": "y", "a2": "x"})
    values["model"]["path"] = str(tiny / "bert")
    values |= {"adapter": {"rank": 2}, "federation": {"rounds": 2, "local_steps": 2, "batch_size": 4, "lr": 0.01}}
    values["data"]["max_length"] = 24

    def path(name: str, **more) -> str:
        config = from_dict(json.loads(json.dumps(values)) | more | {"output": {"dir": str(root / name)}})
        (root / f"{name}.yaml").write_text(config.to_yaml())
        return str(root / f"{name}.yaml")

    plain, private = path("plain"), path("private", privacy={"epsilon": 8.0, "key_dir": str(root / "keys")})
    space = root / "space.py"
    space.write_text(
        "from ray import tune\nfrom fedray.sweep import Sweep\n"
        "SWEEP = Sweep(space={'federation.lr': tune.grid_search([1e-2, 2e-2])}, base={'federation.rounds': 1}, "
        "max_concurrent=1)\n"
    )
    swept = from_dict(json.loads(json.dumps(values))).model_dump(mode="json", exclude={"output", "worker", "seed"})
    (root / "swept.yaml").write_text(json.dumps(swept))
    commands = [
        ["run", "--config", plain],
        ["run", "--config", private],
        ["run", "--config", plain, "--output.dir", str(root / "nowhere"), "--clients.b1.node_labels", "silo=z"],
        [
            "run",
            "--config",
            plain,
            "--output.dir",
            str(root / "waited"),
            "--clients.b1.node_labels",
            "silo=late",
            "--federation.rounds",
            "1",
            "--worker.wait",
            "100",
            "--worker.gpus",
            "0",
        ],
        [
            "sweep",
            "--space",
            str(space),
            "--out",
            str(root / "sweep"),
            "--config",
            str(root / "swept.yaml"),
            "--federation.rounds",
            "1",
        ],
    ]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLUSTER, str(root / "opened.jsonl"), json.dumps(commands)],
        env=env,
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert "CODES" in done.stdout, done.stdout + done.stderr
    opened = [json.loads(line) for line in (root / "opened.jsonl").read_text().splitlines()]
    return done, opened, root


@pytest.mark.slow
def test_a_clients_data_are_opened_on_its_own_nodes_only(cluster_run):
    done, opened, _ = cluster_run
    who = {name: {where for where, file in opened if f"/silos/{name}/" in file} for name in ("a1", "a2", "b1")}
    assert who == {"a1": {"x"}, "a2": {"x"}, "b1": {"y", "late"}}, (who, done.stdout + done.stderr)

    # A sweep's trials, whose coordinators see every update, are on nobody's machine but the head's.
    assert {where for where, file in opened if "/sweep/trials/" in file} == {"head"}


@pytest.mark.slow
def test_runs_and_sweeps_over_silos_end_well_and_an_unknown_label_is_refused(cluster_run):
    done, _, root = cluster_run
    codes, _, states = done.stdout.rsplit("CODES ", 1)[1].partition(" STATES ")
    assert json.loads(codes) == [0, 0, 2, 0, 0], done.stdout + done.stderr
    assert json.loads(states) == ["DEAD"]
    assert (
        "no node has the labels silo=z that clients.b1.node_labels asks for (there are silo=x, silo=y)" in done.stderr
        and not (root / "nowhere").exists()
    )
    for name in ("plain", "private"):
        rounds = [json.loads(line) for line in (root / name / "rounds.jsonl").read_text().splitlines()]
        assert len(rounds) == 2 and rounds[-1]["cohort"] == ["a1", "b1", "a2"] and not rounds[-1]["dropped"]
    assert json.loads((root / "sweep" / "summary.json").read_text())["trials"] == {"finished": 2}
