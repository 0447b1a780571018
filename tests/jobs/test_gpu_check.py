"""The script for a machine with a GPU, rehearsed here at a tiny size: every check holds, every row is measured."""

import re
import subprocess
import sys

from support import ROOT


def test_the_rehearsal_checks_and_measures_everything():
    words = [sys.executable, "-W", "ignore", str(ROOT / "jobs" / "gpu_check.py"), "--tiny"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    right = [line for line in lines if line.startswith("right: ")]
    assert len(right) == 16 and not any(line.startswith("WRONG") for line in lines)
    for what in ("fedex on the device", "bf16 base", "loss_chunk", "nf4", "clients", "clipped", "over gloo", "abba"):
        assert any(what in line for line in right), what
    rows = [re.split(r"\s*│\s*", line.strip("│ "))[:5] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == [
        "lora",
        "lora-sb",
        "abba",
        "lora, compute bfloat16",
        "lora, checkpointing",
        "lora, loss_chunk 1024",
        "lora, checkpointing, loss_chunk 1024",
        "lora over nf4",
        "lora, DP's passes",
        "lora, 4 clients together",
    ]
    assert all(float(row[1].replace(",", "")) > 0 and float(row[2]) > 0 for row in rows)
