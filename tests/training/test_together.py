"""Clients that train together against the same clients one after the other: the oracle is `LocalTrainer.train`."""

import json
import shutil

import pytest
import torch
from support import rounds, run

from fedray.adapters import ADAPTERS
from fedray.adapters.base import Adapter, Layer
from fedray.errors import ConfigError, RoundError
from fedray.federation.results import classes_of, global_view, load_state, read_run_config
from fedray.federation.worker import Worker
from fedray.methods.state import View
from fedray.training import together
from fedray.training.local import LocalTrainer

BATCHED = {"worker": {"cpus": 1, "batch_clients": 3}}
PAIRS = [
    ("fedit", "lora"),
    ("ffa", "lora"),
    ("fedex", "lora"),
    ("fedsa", "lora"),
    ("fra", "lora"),
    ("flora", "lora"),
    ("fedask", "lora"),
    ("fed-sb", "lora-sb"),
    ("ravan", "ravan"),
    ("fra", "abba"),
]


def tensors(folder):
    config = read_run_config(folder)
    view = global_view(config, load_state(folder, config, classes_of(config)))
    return view.tensors | {name: delta.dense() for name, delta in view.base.items()}


def alike(make_config, **options):
    """Both ways, with SGD: Adam would magnify the last digit of gradients near zero."""
    options = {"federation__optimizer": "sgd", "federation__lr": 0.3, "federation__clients": 5} | options
    alone, batched = run(make_config(**options)), run(make_config(**options | BATCHED))
    one, other = tensors(alone), tensors(batched)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)
    for a, b in zip(rounds(alone), rounds(batched), strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], abs=1e-5)
    return rounds(alone), one


@pytest.mark.parametrize("kind", ADAPTERS)
def test_each_clients_product_is_the_delta_of_its_factors(kind):
    """Shared or its own, every factor."""
    adapter, layer = ADAPTERS[kind](), Layer("l", 12, 10, 2, 0.7)
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    shapes, x_ctn = adapter.shapes(layer), random(3, 5, 10)
    for shared in [(), *((name,) for name in shapes), tuple(shapes)]:
        factors = {n: random(*s) if n in shared else random(3, *s) for n, s in shapes.items()}
        y_ctm = adapter.together(layer, factors, x_ctn) * layer.scale
        one_by_one = Adapter.together(adapter, layer, factors, x_ctn) * layer.scale
        torch.testing.assert_close(one_by_one, y_ctm)
        for i in range(3):
            own = {n: t if n in shared else t[i] for n, t in factors.items()}
            torch.testing.assert_close(y_ctm[i], x_ctn[i] @ adapter.delta(layer, own).dense().T)


@pytest.mark.parametrize(("method", "kind"), PAIRS)
def test_a_run_is_the_same(make_config, method, kind):
    alike(make_config, method__name=method, adapter={"kind": kind, "rank": 2 if kind != "abba" else 4})


@pytest.fixture
def bert(tiny, tmp_path) -> dict[str, str]:
    """A classifier whose dropout is in its modules, but not in its attention."""
    folder = tmp_path / "bert"
    shutil.copytree(tiny / "bert", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return {"path": str(folder), "task": "classification"}


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_each_client_has_its_own_dropout_and_head(make_config, bert, task):
    options = dict(task=task, adapter__dropout=0.3) | ({"model": bert} if task == "classification" else {})
    _, with_dropout = alike(make_config, **options)
    _, without = alike(make_config, **options | {"adapter__dropout": 0.0})
    assert max((with_dropout[n] - without[n]).abs().max() for n in without) > 1e-4


def test_each_client_has_its_own_clip_rate_steps_and_micro_batches(make_config):
    clients = {"client-0": {"lr": 0.1}, "client-1": {"local_steps": 3}, "client-3": {"batch_size": 2}}
    alike(make_config, clients=clients, federation__accumulate=2, federation__max_grad_norm=0.01)
    alike(make_config, federation__proximal=0.5, federation__max_grad_norm=None)


def test_adamw_agrees_too_while_gradients_are_large(make_config):
    alike(make_config, federation__optimizer="adamw", federation__lr=1e-3, federation__rounds=1)


def test_clients_of_different_ranks(make_config):
    alike(make_config, method__name="flora", adapter={"kind": "lora", "rank": [3, 1, 2, 3, 1], "alpha": 4})


def test_who_fails_fails_alone(make_config, monkeypatch):
    """One client's loss stops being a number; another's data cannot be read: the others' updates do not change."""
    options = dict(federation={"clients": 5, "rounds": 2, "local_steps": 2, "batch_size": 4, "quorum": 0.4, "lr": 0.01})
    options["federation"]["optimizer"] = "sgd"
    examples = LocalTrainer.examples

    def unreadable(self, part, client=""):
        if (part, client) == ("train", "client-1"):
            raise ValueError("its file is gone")
        return examples(self, part, client)

    monkeypatch.setattr(LocalTrainer, "examples", unreadable)
    real = together.flaw_of_loss
    clients = iter([False, True, *([False] * 1000)])
    monkeypatch.setattr(
        together,
        "flaw_of_loss",
        lambda *given: FloatingPointError("the loss became nan") if next(clients) else real(*given),
    )
    folder = run(make_config(**options | BATCHED))
    first, second = rounds(folder)
    assert [d["client"] for d in first["dropped"]] == ["client-1", "client-2"]
    assert "its file is gone" in first["dropped"][0]["reason"] and "became nan" in first["dropped"][1]["reason"]
    assert [d["client"] for d in second["dropped"]] == ["client-1"]


def test_numbers_that_are_none_stay_with_their_client(make_config):
    """Client 1's factors are not finite: the gradients, clips and results of the others are what they are without."""
    config = make_config(**BATCHED, federation__optimizer="sgd", federation__lr=0.3)
    worker = Worker(config, "cpu", 1)
    message = worker.method.broadcast(worker.method.init(worker.spec, worker.trainer.describe()[1]))
    view = worker.method.view(worker.spec, message, "client-0")
    broken = View({n: t * float("nan") for n, t in view.tensors.items()}, view.base, view.trained)
    names = ["client-0", "client-1", "client-2"]
    sound = together.train_together(worker.trainer, dict.fromkeys(names, view), 0, None)
    mixed = together.train_together(worker.trainer, dict.fromkeys(names, view) | {"client-1": broken}, 0, None)
    assert isinstance(mixed["client-1"], FloatingPointError) and "loss became nan" in str(mixed["client-1"])
    for client in ("client-0", "client-2"):
        for name, tensor in sound[client].tensors.items():
            assert torch.equal(mixed[client].tensors[name], tensor)
    alone = worker.trainer.train(view, "client-2", 0)
    for name, tensor in alone.tensors.items():
        torch.testing.assert_close(sound["client-2"].tensors[name], tensor, rtol=0, atol=1e-5)


def test_dropout_outside_modules_is_refused(make_config, tiny):
    """Attention that draws its own dropout cannot give each client its stream."""
    options = dict(federation={"clients": 3, "rounds": 1, "local_steps": 1, "quorum": 1.0}, task="classification")

    config = make_config(
        **options | BATCHED, model={"path": str(tiny / "bert"), "task": "classification", "dropout": 0.1}
    )
    options.pop("task")
    with pytest.raises(
        RoundError, match=r"dropout outside its modules.*set model.dropout to 0, or worker.batch_clients"
    ):
        run(config)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"method__name": "fedex", "method__assignment": "keep"}, "bases of their own"),
        ({"federation__keep_optimizer": True}, "keep_optimizer"),
        ({"privacy": {"epsilon": 5.0}}, "clips each example"),
        ({"worker": {"batch_clients": 3, "zero_stage": 2}}, "zero_stage 2"),
        ({"worker": {"batch_clients": 3, "profile": "client-0:1"}}, "traces one client"),
    ],
)
def test_what_cannot_be_together_is_refused_with_a_sentence(make_config, values, words):
    with pytest.raises((ConfigError, ValueError), match=words):
        make_config(**{"worker": BATCHED["worker"]} | values)


def test_together_inside_secure_sums(make_config):
    """Each client masks its own: the sum is what it is one after the other, but for fixed point's steps."""
    secure = {"privacy": {"secure_aggregation": True}, "method__name": "ffa", "federation__optimizer": "sgd"}
    one, other = (tensors(run(make_config(**secure | w))) for w in ({}, BATCHED))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-5)


def test_together_on_ray_and_under_client_level_privacy(make_config, ray_session):
    """The same bits in both engines: who trains with whom follows from tasks, so each task is of whole batches."""
    options = dict(federation__clients=3, federation__optimizer="sgd", **BATCHED)
    one = tensors(run(make_config(**options)))
    other = tensors(run(make_config(engine="ray", **options | {"worker": BATCHED["worker"] | {"count": 1}})))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-5)
    # Little noise: it follows from all that went before it, to the last bit.
    private = {"privacy": {"unit": "client", "noise": 1e-6, "delta": 1e-5}, "method__name": "ffa"}
    alone, batched = (run(make_config(**options | private | w)) for w in ({"worker": {"cpus": 1}}, {}))
    for name, tensor in tensors(alone).items():
        torch.testing.assert_close(tensors(batched)[name], tensor, rtol=0, atol=1e-5)
