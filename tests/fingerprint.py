"""Digests of whole runs, to show that a change of the code changed no bit: `python tests/fingerprint.py OUT.json [CASE
...]`.

Run it with two checkouts (`PYTHONPATH=CHECKOUT`) and compare the two files. Every case goes through the command line,
so that it means the same in any version. What a clock, a random name or a place in the code decides is left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["FEDRAY_UNSAFE_TEST_KEY"] = "tests"
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import yaml

SECURE = "--privacy.secure_aggregation true --federation.max_grad_norm 1.0"
EXAMPLE = "--privacy.epsilon 8 --model.dropout 0 --federation.batch_size 4"
CLIENT = "--privacy.unit client --privacy.epsilon 50 --privacy.delta 0.01 --federation.clients 6"
SB = "--adapter.kind lora-sb --method.name fed-sb"

#: name -> flags beside those of every case.
CASES = {
    "plain": "--method.name fedex",
    "plain-cohort": "--method.name fedex --federation.clients 5 --federation.cohort 3 --federation.keep_optimizer true",
    "plain-held-out": "--method.name fedex --data.client_held_out 0.3 --method.weights equal",
    "plain-bytes": "--method.name fedit --federation.max_bytes 30000",
    "truncated": "--method.name fedex --method.residual_rank 1",
    "keep": "--method.name fedex --method.assignment keep",
    "fra-fold": "--method.name fra --method.residual fold --federation.rounds 6",
    "fra-ffa": "--method.name fra-ffa",
    "florist": "--method.name florist",
    "rolora": "--method.name rolora --federation.rounds 4",
    "fedrpca": "--method.name fedrpca",
    "lora-fair": "--method.name lora-fair",
    "fedsvd": "--method.name fedsvd",
    "abba": "--adapter.kind abba --method.name fedex",
    "ravan": "--adapter.kind ravan --method.name ravan",
    "adam": "--method.name fedit --method.server_optimizer adam --method.server_lr 0.01",
    "example": f"--method.name ffa {EXAMPLE}",
    "example-cohort": f"--method.name fedex {EXAMPLE} --federation.clients 5 --federation.cohort 2",
    "example-budget": "--method.name fedit --privacy.epsilon 8 --privacy.noise 0.9 --federation.rounds 9",
    "example-fedask": f"--method.name fedask {EXAMPLE}",
    "example-fedsa": f"--method.name fedsa {EXAMPLE}",
    "subspace": f"{SB} {EXAMPLE} --adapter.subspace private",
    "client": f"--method.name fedit {CLIENT}",
    "client-adaptive": f"--method.name ffa {CLIENT} --privacy.adaptive_clip 0.5 --federation.cohort 4",
    "secure": f"--method.name fedit {SECURE}",
    "secure-example": f"--method.name ffa {EXAMPLE} --privacy.secure_aggregation true",
    "secure-client": f"--method.name fedit {CLIENT} --privacy.secure_aggregation true --privacy.adaptive_clip 0.5",
    "secure-subspace": f"{SB} {EXAMPLE} --adapter.subspace private --privacy.secure_aggregation true",
    "secure-sketches": f"{SB} --adapter.subspace gradient-raw --privacy.secure_aggregation true",
    "personal": "--method.name fedsa",
    "personal-held-out": "--method.name fedsa --data.client_held_out 0.3",
    "asking": "--method.name fedask",
    "mixed-flora": "--method.name flora --adapter.rank 4,2,3",
    "mixed-hetlora": "--method.name hetlora --adapter.rank 4,2,3",
    "mixed-flexlora": "--method.name flexlora --adapter.rank 4,2,3",
    "start-weights": SB,
    "start-gradient": f"{SB} --adapter.subspace gradient",
    "start-raw": f"{SB} --adapter.subspace gradient-raw",
    "start-public": f"{SB} --adapter.subspace public --adapter.subspace_source {{root}}/text.jsonl",
    "classes": (
        "--method.name fedex --model.path {root}/bert --model.task classification --data.source {root}/classes.csv"
    ),
    "ray": "--engine ray --method.name fedex --worker.count 2 --federation.keep_optimizer true",
    "ray-example": f"--engine ray --method.name ffa {EXAMPLE} --worker.count 2",
    "resumed": "--method.name fedex --federation.rounds 30 --federation.keep_optimizer true",
    "resumed-example": f"--method.name ffa {EXAMPLE} --federation.rounds 30",
    "resumed-client": f"--method.name fedit {CLIENT} --privacy.adaptive_clip 0.5 --federation.rounds 30",
}
COMMON = (
    "--engine inline --model.path {root}/llama --adapter.rank 2 --adapter.alpha 4 --data.source {root}/text.jsonl "
    "--data.max_length 48 --federation.clients 3 --federation.rounds 3 --federation.local_steps 2 "
    "--federation.batch_size 4 --federation.lr 0.01 --worker.cpus 1"
)
CLOCK = {"seconds", "wall_seconds", "place", "draw", "run"}


def make_inputs(root: Path) -> None:
    """Two tiny models and data for them."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=259, pad_token_id=0
    )
    llama = LlamaConfig(**shape, num_key_value_heads=2, max_position_embeddings=128, eos_token_id=1, bos_token_id=None)
    bert = BertConfig(**shape, max_position_embeddings=128, num_labels=2)
    for name, model in (("llama", LlamaForCausalLM(llama)), ("bert", BertForSequenceClassification(bert))):
        model.save_pretrained(root / name)
        ByT5Tokenizer(extra_ids=0).save_pretrained(root / name)
    draw = random.Random(0)
    words = "the a cat dog sat ran on under mat road green red and then".split()
    lines = [{"text": " ".join(draw.choice(words) for _ in range(draw.randint(4, 20)))} for _ in range(90)]
    (root / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [f"{' '.join(draw.choice(words) for _ in range(draw.randint(1, 9)))},{i % 2}" for i in range(120)]
    (root / "classes.csv").write_text("\n".join(["sentence,label", *rows]) + "\n")


def without_clock(value: Any) -> Any:
    """Plain values without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if k not in CLOCK}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def digest(value: Any) -> str:
    """Of bytes, or of plain values."""
    data = value if isinstance(value, bytes) else json.dumps(without_clock(value), sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:16]


def shape_of(value: Any) -> Any:
    """The keys of nested plain values."""
    if isinstance(value, dict):
        return {k: shape_of(v) for k, v in sorted(value.items())}
    return [shape_of(v) for v in value[:1]] if isinstance(value, list) else None


def look(folder: Path) -> dict[str, Any]:
    """What a run directory holds, as digests, and its numbers in clear where a person would want to see them."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    last = sorted((folder / "checkpoint").glob("round-*"))[-1]
    seen: dict[str, Any] = {
        "final": summary["final"],
        "epsilon": summary["epsilon"],
        "bytes": [summary["bytes_up"], summary["bytes_down"]],
        "rounds": digest(rounds),
        "summary": digest({k: v for k, v in summary.items() if k not in CLOCK}),
        "tensors": digest((last / "tensors.safetensors").read_bytes()),
        "state": digest(json.loads((last / "state.json").read_text())),
        "config keys": digest(shape_of(config)),
        "files": sorted({re.sub(r"tfevents.*", "tfevents", str(p.relative_to(folder))) for p in folder.rglob("*.*")}),
        "adapter": {
            str(p.relative_to(folder)): digest(p.read_bytes())
            for p in sorted(folder.rglob("adapter_model.safetensors"))
        },
    }
    if (folder / "privacy.json").is_file():
        seen["privacy"] = without_clock(json.loads((folder / "privacy.json").read_text()))
        seen["ledger"] = digest(json.loads((folder / "checkpoint" / "ledger.json").read_text()))
    return seen


def rounds_done(folder: Path) -> int:
    """Rounds that are written down."""
    file = folder / "rounds.jsonl"
    return file.read_text().count("\n") if file.is_file() else 0


def run(words: list[str], folder: Path, root: Path, kill: bool) -> None:
    """One run; with `kill` ended by SIGKILL after some rounds, and gone on with."""
    command = [sys.executable, "-m", "fedray.cli", "run", *words, "--output.dir", str(folder)]
    environment = os.environ | {"XDG_STATE_HOME": str(root / "state")}
    if kill:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while child.poll() is None and rounds_done(folder) < 4:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (folder / "summary.json").exists(), "the run ended before it could be killed"
        command.append("--output.resume")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stdout[-500:]}{done.stderr[-2000:]}")


def main(out: str, names: list[str]) -> None:
    with tempfile.TemporaryDirectory(prefix="fedray-fingerprint-") as place:
        root, results = Path(place), {}
        make_inputs(root)
        for name in names or CASES:
            words = f"{COMMON} {CASES[name]}".format(root=root).split()
            run(words, root / "runs" / name, root, kill=name.startswith("resumed"))
            text = json.dumps(look(root / "runs" / name)).replace(str(root), "ROOT")
            results[name] = json.loads(text)
            print(name, results[name]["final"], flush=True)
            Path(out).write_text(json.dumps(results, indent=1, sort_keys=True))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
