"""The benchmark runs and its ways of aggregating agree; its ratios are for people, not for tests."""

import sys

from support import ROOT

sys.path.insert(0, str(ROOT / "jobs"))

import bench
import pytest
from benches import secure_sums
from benches.passes import Shape
from rich.console import Console

from fedray.errors import ConfigError
from fedray.privacy.secure_sum import STEP


def test_the_ways_of_aggregating_agree(capsys):
    bench.aggregation(Console(width=140), 96, 64, clients=5, rank=4)
    rows = [line for line in capsys.readouterr().out.splitlines() if "form" in line or "factored (" in line]
    gaps = [float(row.rstrip(" │").split()[-1]) for row in rows]
    assert len(gaps) == 4 and max(gaps[:3]) < 1e-5 and gaps[3] < 1e-12


def test_the_cohorts_benchmark_runs(capsys):
    bench.cohorts(Console(width=200), (2, 4), size=48, layers=1)
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in ("fedit", "fra", "ravan")) and "4 clients" in out


def test_the_step_benchmark_runs(capsys):
    bench.step(Console(width=140), rounds=2)
    assert "DeepSpeed, ZeRO 0" in capsys.readouterr().out


def test_the_memory_benchmark_runs_and_its_settings_keep_less(capsys):
    """Bytes are counted, not timed: the same on every machine."""
    shape = Shape(hidden=64, inner=128, blocks=2, heads=2, vocabulary=2000, length=64)
    bench.memory(Console(width=160), turns=1, shape=shape)
    rows = [[cell.strip() for cell in line.split("│")[1:]] for line in capsys.readouterr().out.splitlines()]
    standing, _, peaks = ({row[0]: float(row[i]) for row in rows if len(row) > 7} for i in (1, 2, 3))
    assert standing["plain"] == standing["PEFT, plain"] > 1.2 * standing["quantise nf4"]
    assert peaks["plain"] <= 1.02 * peaks["PEFT, plain"]
    assert peaks["checkpointing"] <= 1.02 * peaks["PEFT, checkpointing"] < 0.8 * peaks["plain"]
    assert peaks["loss_chunk 128"] < 0.7 * peaks["plain"]
    assert peaks["checkpointing, loss_chunk 128"] < 0.55 * peaks["checkpointing"]


@pytest.mark.slow
def test_the_sharing_benchmark_measures_less_where_a_file_is_mapped(capsys):
    bench.sharing(Console(width=140), ["--data.max_length", "64"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "examples" in line or "weights" in line]
    assert len(rows) == 4 and all(float(row.split("│")[2]) > 0 for row in rows)


def test_a_clients_bytes_in_a_secure_sum_grow_less_than_twofold_from_50_to_200_clients():
    """Bytes are counted, not timed: the same on every machine. A third of the clients drops out."""
    few, many = (secure_sums.cohort_sum(count, 10, signed=True) for count in (50, 200))
    for one, count in ((few, 50), (many, 200)):
        assert len(one.costs) == count - (count - 1) // 3 and one.error <= count * STEP / 2
    both = [one.median(lambda cost: cost.up) + one.median(lambda cost: cost.down) for one in (few, many)]
    assert both[0] > 20_000 and both[1] < 2 * both[0]


def test_the_run_benchmark_runs(capsys, tiny, monkeypatch):
    monkeypatch.setattr("benches.whole_run.ENGINES", {"one process": ("inline", {})})
    flags = ["--model.path", f"{tiny}/llama", "--data.source", f"{tiny}/text.jsonl", "--data.max_length", "48"]
    flags += ["--federation.clients", "2", "--federation.rounds", "2", "--federation.local_steps", "2"]
    bench.whole_run(Console(width=150), flags, turns=1)
    assert "one process" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="adapter.kind lora"):
        bench.whole_run(Console(width=150), [*flags, "--adapter.kind", "abba", "--adapter.rank", "4"])
