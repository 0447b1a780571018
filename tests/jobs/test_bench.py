"""The benchmark runs and its ways of aggregating agree; its ratios are for people, not for tests."""

import sys

from support import ROOT

sys.path.insert(0, str(ROOT / "jobs"))

import bench
import pytest
from rich.console import Console


def test_the_ways_of_aggregating_agree(capsys):
    bench.aggregation(Console(width=140), 96, 64, clients=5, rank=4)
    rows = [line for line in capsys.readouterr().out.splitlines() if "form" in line or "factored (" in line]
    gaps = [float(row.rstrip(" │").split()[-1]) for row in rows]
    assert len(gaps) == 4 and max(gaps[:3]) < 1e-5 and gaps[3] < 1e-12


def test_the_step_benchmark_runs(capsys):
    bench.step(Console(width=140), rounds=2)
    assert "DeepSpeed, ZeRO 0" in capsys.readouterr().out


@pytest.mark.slow
def test_the_sharing_benchmark_measures_less_where_a_file_is_mapped(capsys):
    bench.sharing(Console(width=140), ["--data.max_length", "64"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "examples" in line or "weights" in line]
    assert len(rows) == 4 and all(float(row.split("│")[2]) > 0 for row in rows)
