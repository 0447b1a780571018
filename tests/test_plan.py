"""What a run would cost, against published counts and against a real run; the other commands."""

import json

import pytest
from support import PAIRS, ROOT

from fedray.cli import main
from fedray.config.read import from_dict, read_config
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.methods import METHODS
from fedray.plan import plan
from fedray.training.outline import make_outline, shape_names


def costs(flags: str, cohort: int):
    return {c.method: c for c in plan(read_config(flags.split()), cohort).costs}


# Millions of numbers with all linear layers at rank 32 (Fed-SB, arXiv 2502.15436): FedIT, FFA, FedEx/FLoRA download at
# k.
PUBLISHED = {
    "mistral-7b": (83.886, 44.04, 25, 2097.15),
    "gemma-2-9b": (108.036, 59.18, 25, 2700.90),
    "llama-3.2-3b": (48.628, 24.77, 5, 243.14),
}


@pytest.mark.parametrize("shape", PUBLISHED)
def test_the_published_counts_come_out(shape):
    lora, ffa, k, fedex = PUBLISHED[shape]
    c = costs(f"--model.path {shape} --adapter.rank 32", k)
    assert c["fedit"].up / 4e6 == c["fra"].down / 4e6 == pytest.approx(lora, abs=6e-4)
    assert c["ffa"].up / 4e6 == pytest.approx(ffa, abs=6e-3)
    assert c["fedex"].down / 4e6 == c["flora"].down / 4e6 == pytest.approx(fedex, abs=6e-3)
    assert c["flora"].first_down == 0 and c["fra-ffa"].once / 4e6 == pytest.approx(lora - ffa, abs=6e-3)


@pytest.mark.parametrize(
    "shape, billions",
    [
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("llama-3.1-8b", 8.030),
        ("mistral-7b", 7.242),
        ("gemma-2-9b", 9.242),
    ],
)
def test_shapes_have_the_models_sizes_and_no_weights_are_made(shape, billions):
    assert plan(read_config(["--model.path", shape])).base_parameters / 1e9 == pytest.approx(billions, abs=1e-3)
    assert shape in shape_names()


@pytest.mark.parametrize(
    "shape, rank, millions, basis",
    [
        ("mistral-7b", 96, 2.06, 251.7),
        ("mistral-7b", 200, 8.96, 524.3),
        ("gemma-2-9b", 200, 11.76, 675.2),
        ("llama-3.2-3b", 200, 7.84, 303.9),
    ],
)
def test_fed_sbs_published_counts_and_the_basis_they_left_out(shape, rank, millions, basis):
    c = costs(f"--model.path {shape} --adapter.kind lora-sb --adapter.rank {rank} --method.name fed-sb", 25)["fed-sb"]
    assert c.trainable / 1e6 == c.up / 4e6 == c.down / 4e6 == pytest.approx(millions, abs=5e-3)
    assert (
        c.once / 4e6 == pytest.approx(basis, abs=0.06) and c.run_down == c.rounds * c.down + c.once
    )  # r sum(m + n), once
    assert (c.start_up, c.start_down) == (0, 0)


def test_fed_sb_sends_229_times_fewer_numbers_down_than_fedex():
    fedex = costs("--model.path gemma-2-9b --adapter.rank 32", 25)["fedex"].down
    fed_sb = costs("--model.path gemma-2-9b --adapter.kind lora-sb --adapter.rank 200 --method.name fed-sb", 25)[
        "fed-sb"
    ].down
    assert fedex / fed_sb == pytest.approx(229.7, abs=0.05)


@pytest.mark.parametrize("pair", PAIRS)
def test_plan_equals_what_a_run_then_moves(make_config, pair):
    kind, name, _ = PAIRS[pair]
    adapter = {"kind": kind, "rank": 4 if kind == "abba" else 2} | (
        {"subspace": "gradient-raw"} if kind == "lora-sb" else {}
    )
    config = make_config(
        task="classification", method__name=name, adapter=adapter, federation__rounds=2, federation__local_steps=1
    )
    prepared = prepare(config)
    cost = plan(config, prepared.cohort).costs[0]
    summary = execute(prepared)
    moved = (summary["bytes_down"], summary["bytes_up"])
    assert moved == (3 * cost.run_down, 3 * cost.run_up) or (
        name == "florist" and moved <= (3 * cost.run_down, 3 * cost.run_up)
    )
    assert summary["trainable_params"] == cost.trainable


def test_plan_of_clients_with_different_ranks(make_config):
    config = make_config(method__name="flora", adapter__rank=[1, 3, 2], federation__rounds=2)
    prepared = prepare(config)
    cost, summary = plan(config, prepared.cohort).costs[0], execute(prepared)
    assert {c.method for c in plan(config, 3).costs} == {"flora", "flexlora", "hetlora", "raflora"}
    assert cost.run_up / 3 == summary["bytes_up"] / (1 + 3 + 2)  # the largest rank's
    assert 3 * cost.run_down == summary["bytes_down"] == 3 * cost.down


def test_memory_counts_base_by_dtype_and_the_copy_only_where_the_base_moves():
    fp32, bf16 = (
        plan(read_config(f"--model.path llama-3.2-1b --model.dtype {d} --method.name fedit".split())).memory
        for d in ("float32", "bfloat16")
    )
    assert fp32.base == 2 * bf16.base and fp32.host_copy_of_moved_layers == 0
    moved = plan(read_config("--model.path llama-3.2-1b".split())).memory
    assert (
        moved.host_copy_of_moved_layers > 0
        and moved.adapter_and_optimizer
        == 16 * plan(read_config("--model.path llama-3.2-1b".split())).costs[0].trainable
    )


def test_plan_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("plan --model.path mistral-7b --adapter.rank 32 --federation.clients 25 --json".split()) == 0
    told = json.loads(capsys.readouterr().out)
    assert (
        told["costs"][0]["method"] == "fedex"
        and len(told["costs"]) == sum("lora" in m.adapters for m in METHODS.values())
        and told["memory"]["total"] > 7e9
    )
    assert main(["plan"]) == 0
    assert "workers" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert main("plan --model.path mistral-7b --adapter.targets nothing_here".split()) == 2
    assert "match no layer" in capsys.readouterr().err


def test_other_commands(make_config, capsys, tmp_path):
    config = make_config()
    execute(prepare(config))
    folder = config.output.dir
    assert main(["evaluate", folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["round"] == 3
    assert main(["evaluate", folder]) == 0 and "bits_per_byte" in capsys.readouterr().out
    assert (
        main(["export", folder, str(tmp_path / "m"), "--format", "merged"]) == 0
        and (tmp_path / "m" / "model.safetensors").is_file()
    )
    capsys.readouterr()
    assert main(["export", folder]) == 2 and "takes a run directory and a place" in capsys.readouterr().err
    assert main(["methods"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in METHODS) and "fedex with lora-sb: only its core trains" in told
    assert main(["methods", "--markdown"]) == 0 and capsys.readouterr().out.strip() in (ROOT / "README.md").read_text()
    assert main(["rnu"]) == 2 and "unknown command 'rnu'" in capsys.readouterr().err
    assert main(["run", "--help"]) == 0 and "--federation.local_steps" in capsys.readouterr().out
    assert main([]) == 0 and main(["--version"]) == 0


def test_a_quantised_base_takes_fewer_bytes():
    sizes = {kind: plan(_of_shape(kind)).memory for kind in (None, "nf4", "int8")}
    adapted = sum(layer.m * layer.n for layer in make_outline(_of_shape(None)).layers)
    assert sizes[None].base - sizes["int8"].base == adapted
    assert sizes[None].base - sizes["nf4"].base == pytest.approx((2 - 0.516) * adapted, rel=1e-6)
    assert sizes["nf4"].host_copy_of_moved_layers == 0 < sizes[None].host_copy_of_moved_layers


def _of_shape(kind):
    model = {"path": "llama-3.2-1b", "dtype": "bfloat16", "quantise": kind}
    return from_dict({"model": model, "method": {"name": "fedex"}, "federation": {"clients": 3}})
