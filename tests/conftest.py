"""Tiny real models and data, and one Ray for the whole session."""

from __future__ import annotations

import csv
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"  # set before ray is imported, here and in every process the tests start
# A starved worker makes a test slow, not right.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - this is how Ray spells it
os.environ["FEDRAY_UNSAFE_TEST_KEY"] = "tests"  # noise that repeats from run to run; tests of real keys take it away
_STATE = tempfile.TemporaryDirectory(prefix="fedray-tests-")
os.environ["XDG_STATE_HOME"] = _STATE.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Threads that wait for each other by turning in place take the processor from other processes; those that sleep give
# the same bits. Here, and in every process that the tests start.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from fedray.config.read import from_dict
from fedray.config.sections import Config

pytest.register_assert_rewrite("support")  # its asserts say what differed, as a test's do

from support import SHARED

#: Modules and fixtures whose tests start a Ray, each in its own way.
WITH_RAY = {"test_chaos", "test_jobs"}
RAYS = {"ray_session", "head", "gpu_head", "cluster_run"}


def starts_ray(item) -> bool:
    """Also a case for the engine `ray` of a test that asks for `ray_session` only then."""
    asks = getattr(item, "callspec", None) is not None and item.callspec.params.get("engine") == "ray"
    return asks or item.path.stem in WITH_RAY or bool(RAYS & set(item.fixturenames))


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # pytest-xdist is here
        config.option.loadscopereorder = False  # groups begin in the order that is given below, not the largest first


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in this hook too, and would not see later ones
def pytest_collection_modifyitems(items):
    missing = pytest.mark.skip(reason=f"{SHARED} is not here: real encoder and data are needed")
    for item in items:
        # With `-n 2 --dist loadgroup`: one process has all that starts Ray, so that there is one Ray at a time, and
        # begins with it; the rest goes by files.
        if item.get_closest_marker("xdist_group") is None:
            group = "ray" if starts_ray(item) else item.location[0]
            item.add_marker(pytest.mark.xdist_group(group))
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(missing)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.get_closest_marker("xdist_group").args[0] != "ray")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with `llama`, `bert` (non-square layers, byte tokens), `text.jsonl` (by author) and `classes.csv`."""
    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=259, pad_token_id=0
    )
    llama = LlamaForCausalLM(
        LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, bos_token_id=None)
    )
    bert = BertForSequenceClassification(
        BertConfig(**shape, max_position_embeddings=128, num_labels=2, hidden_dropout_prob=0.1)
    )
    for name, model in (("llama", llama), ("bert", bert)):
        model.save_pretrained(root / name)
        ByT5Tokenizer(extra_ids=0).save_pretrained(root / name)
    llama.config.pad_token_id = 2  # the tokenizer's is 0
    llama.save_pretrained(root / "llama-other-pad")
    ByT5Tokenizer(extra_ids=0).save_pretrained(root / "llama-other-pad")
    draw = random.Random(0)
    words = "the a cat dog sat ran on under mat road green red and then".split()
    with (root / "text.jsonl").open("w") as file:
        for i in range(90):
            text = " ".join(draw.choice(words) for _ in range(draw.randint(4, 20)))
            file.write(json.dumps({"text": text, "author": f"author-{i % 5}", "answer": draw.choice(words)}) + "\n")
    with (root / "classes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sentence", "label"])
        for i in range(120):
            good = i % 3 != 0
            rows.writerow(
                [
                    " ".join(
                        draw.choice(["good", "fine"] if good else ["bad", "null"]) for _ in range(draw.randint(1, 9))
                    ),
                    int(good),
                ]
            )
    return root


@pytest.fixture(scope="session")
def make_config(tiny, tmp_path_factory):
    """A function: dotted overrides -> a tiny, fast config with its own output directory."""

    def build(task: str = "causal-lm", **overrides) -> Config:
        values = {
            "model": {"path": str(tiny / ("llama" if task == "causal-lm" else "bert")), "task": task},
            "adapter": {"rank": 2, "alpha": 4},
            "data": {"source": str(tiny / ("text.jsonl" if task == "causal-lm" else "classes.csv")), "max_length": 48},
            "federation": {"clients": 3, "rounds": 3, "local_steps": 2, "batch_size": 4, "lr": 0.01},
            "worker": {"cpus": 1},
            "engine": "inline",
            "output": {"dir": str(tmp_path_factory.mktemp("run") / "out")},
        }
        for key, value in overrides.items():
            section, _, name = key.partition("__")
            if name:
                values.setdefault(section, {})[name] = value
            else:
                values[section] = value
        return from_dict(values)

    return build


@pytest.fixture(scope="session")
def smollm(tmp_path_factory) -> Path:
    """A real instruction-tuned decoder, unpacked: 135 million parameters in bf16."""
    folder = tmp_path_factory.mktemp("smollm")
    unpack = SHARED / "models" / "smollm2-135m-instruct" / "unpack.py"
    subprocess.run([sys.executable, unpack, folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def ray_session():
    """One Ray for all tests that need it."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()
