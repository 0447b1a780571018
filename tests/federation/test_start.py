"""LoRA-SB's bases: the clients' gradient against the centralised one, sketches against dense SVDs, bytes, and the same
bits on both engines."""

import json

import pytest
import torch
from support import SHARED, run, same_bits

from fedray.adapters import attach
from fedray.config.read import read_config
from fedray.federation import results, start
from fedray.federation.channels.base import Answer
from fedray.federation.prepare import prepare
from fedray.federation.questions import DenseGradient
from fedray.federation.run import execute
from fedray.federation.wire import pack, unpack
from fedray.federation.worker import Worker
from fedray.training import subspace


def fed_sb(make_config, subspace=None, **options):
    adapter = {
        "kind": "lora-sb",
        "rank": 3,
        **({"subspace": subspace} if subspace else {}),
        **options.pop("adapter", {}),
    }
    federation = {
        "clients": 3,
        "rounds": 2,
        "local_steps": 2,
        "batch_size": 4,
        "lr": 0.2,
        **options.pop("federation", {}),
    }
    return make_config(adapter=adapter, method={"name": "fed-sb"}, federation=federation, **options)


def centralised(trainer, examples) -> dict[str, torch.Tensor]:
    """The plain way: a copy of the loss's gradient in every frozen weight, the mean over single sequences."""
    bases = attach.base_layers(trainer.model)
    trainer.model.eval()
    for module in bases.values():
        module.weight.requires_grad_(True)
        module.weight.grad = None
    for example in examples:
        batch = trainer.task.collate([example])
        (
            trainer.task.loss(lambda i: trainer.model(**{k: v for k, v in i.items() if k != "labels"}).logits, batch)
            / len(examples)
        ).backward()
    found = {name: module.weight.grad.clone() for name, module in bases.items()}
    for module in bases.values():
        module.weight.requires_grad_(False)
        module.weight.grad = None
    return found


def collector(worker, clients):
    """What the plain channel's `ask` does, with no coordinator."""

    def answers(question, asked):
        told = [worker.ask(c, question, None) for c in asked]
        return [
            Answer(report.client, float(report.examples or 1), lambda packet=packet: unpack(packet), report.nbytes)
            for packet, _, report in told
        ]

    return answers


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_the_federated_gradient_equals_the_centralised_one(make_config, task):
    """Every example of three clients of unequal size: sum p_i G_i with p_i by examples is the mean over all."""
    config = make_config(
        task=task,
        adapter={"kind": "lora-sb", "rank": 3},
        method={"name": "fed-sb"},
        data__partition="dirichlet" if task == "classification" else "iid",
        federation={"clients": 3, "rounds": 1, "local_steps": 1, "batch_size": 4},
    )
    worker = Worker(config, "cpu", 1)
    clients = worker.trainer.data.clients
    held = {c: worker.trainer.examples("train", c) for c in clients}
    want = centralised(worker.trainer, [e for c in clients for e in held[c]])
    told = collector(worker, clients)(DenseGradient(tuple(want), 10**6), clients)
    assert [answer.weight for answer in told] == [len(held[c]) for c in clients]
    total = start._mean(told, {name: tuple(gradient.shape) for name, gradient in want.items()})
    for name, gradient in want.items():
        got = total[name].float()
        assert (got - gradient).norm() < 1e-6 * gradient.norm(), name
        assert gradient.norm() > 0


def test_sketches_are_those_of_the_dense_gradient(make_config):
    worker = Worker(fed_sb(make_config), "cpu", 1)
    examples = worker.trainer.gradient_examples("client-0", 7)
    dense = subspace.dense(worker.trainer, examples, [layer.name for layer in worker.spec.layers])
    g = torch.Generator().manual_seed(0)
    right = {layer.name: torch.randn(layer.n, 5, generator=g) for layer in worker.spec.layers}
    left = {layer.name: torch.randn(layer.m, 5, generator=g) for layer in worker.spec.layers}
    columns, rows = (
        subspace.range_sketch(worker.trainer, examples, right),
        subspace.row_sketch(worker.trainer, examples, left),
    )
    for name, G in dense.items():
        torch.testing.assert_close(columns[name], G @ right[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rows[name], left[name].T @ G, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_taken_without_dropout_and_leaves_nothing_behind(make_config):
    config = fed_sb(make_config, task="classification")
    worker = Worker(config, "cpu", 1)
    examples = worker.trainer.gradient_examples("client-0", 5)
    names = [layer.name for layer in worker.spec.layers]
    one, two = subspace.dense(worker.trainer, examples, names), subspace.dense(worker.trainer, examples, names)
    assert all(torch.equal(one[n], two[n]) for n in names)
    assert all(p.grad is None for p in worker.trainer.model.parameters())
    assert not any(
        p.requires_grad
        for n, p in worker.trainer.model.named_parameters()
        if "lora" not in n and "modules_to_save" not in n
    )


@pytest.mark.parametrize("source", ["gradient", "gradient-raw", "weights", "public"])
def test_a_run_from_every_subspace_counts_its_bytes_and_reports_its_energy(make_config, tiny, source):
    adapter = {"subspace_source": str(tiny / "text.jsonl")} if source == "public" else {}
    config = fed_sb(make_config, source, adapter=adapter)
    folder = run(config)
    summary = json.loads((folder / "summary.json").read_text())
    state = results.load_state(folder, config, 0)
    moved = start.start_traffic(state.spec)
    up, down = moved.up, moved.down
    assert (summary["start"]["bytes_up"], summary["start"]["bytes_down"]) == (3 * 4 * up, 3 * 4 * down)
    assert bool(up) == source.startswith("gradient")
    basis = sum(t.numel() for t in state.increments[0].tensors.values())
    assert basis == sum(3 * (layer.m + layer.n) for layer in state.spec.layers)
    core = sum(9 for _ in state.spec.layers)
    assert summary["bytes_down"] == 3 * 4 * (2 * core + basis + down) and summary["bytes_up"] == 3 * 4 * (2 * core + up)
    for layer in state.spec.layers:
        B, A = (state.increments[0].tensors[f"{layer.name}.{f}"] for f in ("sb_B", "sb_A"))
        torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.eye(3), rtol=1e-5, atol=1e-5)
    assert source == "weights" or 0.1 < summary["start"]["energy"] <= 1.0
    assert summary["final"] < summary["initial"]


def test_the_signed_subspace_is_that_of_the_signed_sum(make_config):
    config = fed_sb(make_config, "gradient", adapter={"subspace_examples": 9})
    state = results.load_state(run(config), config, 0)
    worker = Worker(config, "cpu", 1)
    clients, names = worker.trainer.data.clients, tuple(layer.name for layer in worker.spec.layers)
    told = collector(worker, clients)(DenseGradient(names, 9), clients)
    for layer in worker.spec.layers:
        total = sum(answer.weight * answer.tensors()[layer.name].double() for answer in told)
        _, S, _ = torch.linalg.svd(total.sign())
        B, A = (state.increments[0].tensors[f"{layer.name}.{f}"].double() for f in ("sb_B", "sb_A"))
        captured = (B.T @ total.sign() @ A.T).norm() ** 2
        assert captured == pytest.approx(S[:3].square().sum().item(), rel=1e-5)


def test_dense_gradients_go_a_group_of_layers_at_a_time(make_config, monkeypatch):
    config, asked = fed_sb(make_config, "gradient"), []
    whole = results.load_state(run(config), config, 0)
    monkeypatch.setattr(start, "GROUP", 32 * 48)
    real = Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda self, c, q, k: asked.append(q.layers) or real(self, c, q, k))
    config = fed_sb(make_config, "gradient")
    small = results.load_state(run(config), config, 0)
    assert len(set(asked)) > 5
    assert all(
        sum(layer.m * layer.n for layer in small.spec.layers if layer.name in group) <= 32 * 48 for group in asked
    )
    assert all(torch.equal(small.increments[0].tensors[n], t) for n, t in whole.increments[0].tensors.items())


@pytest.mark.parametrize("source", ["gradient-raw", pytest.param("public", marks=pytest.mark.slow)])
def test_both_engines_start_from_the_same_bits(source, make_config, ray_session, tiny):
    """The public data set belongs to no client: any worker reads it, where each client has its own worker too."""
    more = {"adapter": {"subspace_source": str(tiny / "text.jsonl")}} if source == "public" else {}

    def config(**engine):
        made = fed_sb(make_config, source, **more)
        return made.model_copy(update=engine)

    ray_worker = config().worker.model_copy(update={"count": 2, "cpus": 1})
    federation = config().federation.model_copy(update={"clients": 2, "rounds": 1})
    same_bits(run(config(federation=federation)), run(config(federation=federation, engine="ray", worker=ray_worker)))


def test_a_run_killed_after_its_start_does_not_start_again(make_config, monkeypatch):
    from fedray.federation import pool_inline

    config = fed_sb(make_config, "gradient-raw")
    whole = run(fed_sb(make_config, "gradient-raw"))
    real = pool_inline.InlinePool.train
    monkeypatch.setattr(pool_inline.InlinePool, "train", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(pool_inline.InlinePool, "train", real)
    monkeypatch.setattr(pool_inline.InlinePool, "ask", lambda *a: pytest.fail("the start was made twice"))
    same_bits(whole, run(config.model_copy(update={"output": config.output.model_copy(update={"resume": True})})))


@pytest.mark.shared
def test_the_range_finder_on_a_real_encoder_captures_what_the_dense_svd_does(tmp_path):
    """Every adapted layer of MiniLM, real SST-2: the summed gradient's energy in the sketched bases is at least 99 % of
    the best rank-8."""
    config = read_config(
        f"--engine inline --model.path {SHARED}/models/minilm-l6 --model.task classification --data.source "
        f"{SHARED}/data/sst2 --data.limit 600 "
        "--data.partition dirichlet --data.max_length 64 --data.test_limit 20 --federation.clients 3 --adapter.kind "
        "lora-sb --adapter.rank 8 --adapter.subspace_examples 16 "
        f"--adapter.subspace gradient-raw --method.name fed-sb --output.dir {tmp_path}/x".split()
    )
    worker = Worker(config, "cpu", 1)
    clients = worker.trainer.data.clients
    found = start.make_start(worker.spec, clients, collector(worker, clients))
    names = tuple(layer.name for layer in worker.spec.layers)
    told = collector(worker, clients)(DenseGradient(names, 16), clients)
    total = start._mean(told, {layer.name: (layer.m, layer.n) for layer in worker.spec.layers})
    captured = best = whole = 0.0
    for layer in worker.spec.layers:
        G = total[layer.name]
        B, A = (found.tensors[f"{layer.name}.{f}"].double() for f in ("sb_B", "sb_A"))
        mine, top = (B.T @ G @ A.T).norm() ** 2, torch.linalg.svdvals(G)[:8].square().sum()
        assert mine >= 0.99 * top, layer.name
        captured, best, whole = captured + mine, best + top, whole + G.norm() ** 2
    assert found.energy == pytest.approx(
        (captured / whole).item(), rel=0.1
    )  # the report's norm is estimated from the sketch
    assert len(names) > 30 and captured >= 0.999 * best


@pytest.mark.shared
def test_the_public_data_never_touches_a_client(tmp_path, monkeypatch):
    config = read_config(
        f"--engine inline --model.path {SHARED}/models/minilm-l6 --model.task classification --data.source "
        f"{SHARED}/data/sst2 --data.limit 60 "
        "--data.max_length 64 --data.test_limit 8 --federation.clients 3 --federation.rounds 1 "
        "--federation.local_steps 1 --adapter.kind lora-sb "
        f"--adapter.subspace public --adapter.subspace_source {SHARED}/data/sst2/validation.tsv --adapter.targets "
        "query --method.name fed-sb --worker.cpus 1 "
        f"--output.dir {tmp_path}/x".split()
    )
    asked = []
    real = Worker.ask
    monkeypatch.setattr(Worker, "ask", lambda self, c, q, k: asked.append(c) or real(self, c, q, k))
    summary = execute(prepare(config))
    assert set(asked) == {"(public data)"} and summary["start"]["bytes_up"] == 0 and pack({}).nbytes == 0
