"""Every entrypoint of the manifests, run as it stands."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from manifests import K8S, MANIFESTS, things
from support import Head


@pytest.fixture(scope="module")
def places(tiny) -> Iterator[dict[str, Path]]:
    """/etc/fedray, /results, /models, /data and /keys, as the pods have them, by links that are removed again."""
    root = Path(tempfile.mkdtemp(prefix="fr-pod-", dir="/tmp"))
    made = {
        Path(p): root / p.strip("/").replace("/", "-") for p in ("/etc/fedray", "/results", "/models", "/data", "/keys")
    }
    linked = []
    try:
        for place, target in made.items():
            target.mkdir()
            if place.exists() or place.is_symlink():
                pytest.skip(f"{place} exists on this machine")
            try:
                place.symlink_to(target)
            except OSError as error:
                pytest.skip(f"{place} cannot be made here: {error}")
            linked.append(place)
        rows = "sentence,label\n" + "".join(f"{'good' if k % 2 else 'bad'} {k},{k % 2}\n" for k in range(60))
        (root / "data" / "train.csv").write_text(rows)
        (root / "models" / "held-out").mkdir()
        (root / "models" / "held-out" / "test.csv").write_text(rows)
        shutil.copytree(tiny / "bert", root / "models" / "model")
        yield {str(p): t for p, t in made.items()}
    finally:
        for place in linked:
            place.unlink()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def gpu_head(tmp_path_factory) -> Iterator[Head]:
    """A head without CPUs, and a node for each silo, each with logical GPUs."""
    made = Head(
        tmp_path_factory.mktemp("gpu-head"),
        ["--num-cpus=0"],
        {"DS_ACCELERATOR": "cpu", "RAY_OVERRIDE_RUNTIME_ENV_DEFAULT_EXCLUDES": ""},
    )
    nodes = [made.join("--num-cpus=4", "--num-gpus=3", f"--labels=silo={silo}") for silo in ("a", "b")]
    yield made
    for node in nodes:
        os.killpg(node.pid, signal.SIGKILL)
    made.close()


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("path", [p for p in MANIFESTS if p.name.startswith("rayjob")], ids=lambda p: p.name)
def test_every_entrypoint_runs_as_it_stands(path, places, gpu_head):
    (thing,) = things(path)
    configs = K8S / "overlays/rayjob-silos/config.yaml" if "silos" in path.name else K8S / "base/config.yaml"
    for name, text in things(configs)[0]["data"].items():
        (places["/etc/fedray"] / name).write_text(text)
    words = thing["spec"]["entrypoint"].split()
    done = gpu_head.submit(*words, working_dir=None)
    assert done.returncode == 0, done.stdout + done.stderr
    config = yaml.safe_load(things(configs)[0]["data"]["config.yaml"])
    out = (
        places["/results"] / Path(words[words.index("--out") + 1] if "sweep" in words else config["output"]["dir"]).name
    )
    assert (out / "summary.json").is_file()
    again = gpu_head.submit(*words, working_dir=None)  # what backoffLimit does
    assert again.returncode == 0, again.stdout + again.stderr
    shutil.rmtree(out)  # the next manifest's run has the same name
