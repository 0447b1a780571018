"""Models and data sets by hub id, over a hub of one's own (`HF_ENDPOINT`): a private token, a download that breaks, and
no network at all."""

import json

import pytest
import torch
from hub import TOKEN, fedray, serving
from safetensors.torch import load, save


@pytest.fixture
def hub(tiny):
    with serving() as hub:
        hub.repositories["models/org/llama"] = {p.name: p.read_bytes() for p in (tiny / "llama").iterdir()}
        hub.repositories["datasets/org/notes"] = {"data/train.jsonl": (tiny / "text.jsonl").read_bytes()}
        yield hub


def small(folder):
    flags = {"model.path": "org/llama", "data.source": "org/notes", "data.max_length": 48, "adapter.rank": 2}
    flags |= {"federation.clients": 2, "federation.rounds": 1, "federation.local_steps": 1, "federation.batch_size": 2}
    flags |= {"engine": "inline", "worker.cpus": 1, "output.dir": folder}
    return [word for key, value in flags.items() for word in (f"--{key}", str(value))]


def test_private_repositories_a_broken_download_and_then_no_network(hub, tmp_path):
    hub.private |= set(hub.repositories)
    files = hub.repositories["models/org/llama"]
    # Larger than what is downloaded in one piece (10 MB), which is what a download goes on after; nobody reads it.
    padding = {"unread": torch.zeros(6 << 20)}
    files["model.safetensors"] = save(load(files["model.safetensors"]) | padding, {"format": "pt"})
    hub.breaks |= {"model.safetensors"}
    said, code = fedray("run", hub, tmp_path / "home", *small(tmp_path / "one"), HF_TOKEN=TOKEN)
    assert code == 0, said
    asked = [(r, path) for method, path, r in hub.log if method == "GET" and path.startswith("/elsewhere/")]
    assert asked[0][0] is None and asked[1][0].startswith("bytes=") and len(asked) == 2  # it went on where it broke
    assert hub.tokens_elsewhere == 0
    first = json.loads((tmp_path / "one" / "summary.json").read_text())

    hub.shutdown()
    hub.server_close()
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    said, code = fedray("run", hub, tmp_path / "home", *small(tmp_path / "two"), **offline)
    assert code == 0, said
    second = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert {**first, "wall_seconds": 0} == {**second, "wall_seconds": 0}


def test_what_the_hub_does_not_give_is_one_sentence(hub, tmp_path):
    hub.private.add("models/org/llama")
    said, code = fedray("plan", hub, tmp_path / "home", *small(tmp_path / "run"))
    assert code == 2 and "model.path 'org/llama' cannot be read" in said and "Traceback" not in said
    assert "set HF_TOKEN" in said
    hub.private = {"datasets/org/notes"}
    said, code = fedray("plan", hub, tmp_path / "other", *small(tmp_path / "run"))
    assert code == 2 and "data source 'org/notes'" in said and "Traceback" not in said
