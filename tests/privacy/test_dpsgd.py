"""DP-SGD in a client's step: per-sample gradients, clipping, noise, every engine and adapter; and what stops the
run."""

import math

import pytest
import torch
from scipy import stats
from support import OPTIONS, distance, moved, trainer_and_view
from torch import nn

from fedray.adapters.modules import CoreProduct, HadamardProduct
from fedray.config.build import make_method, make_spec
from fedray.errors import PrivacyError
from fedray.methods import Update
from fedray.privacy import dpsgd
from fedray.privacy.dpsgd import ClippedSum, Mechanism, SampleHooks, noised, private_step
from fedray.privacy.keys import Key
from fedray.privacy.model_checks import check_model
from fedray.training.engine import TorchEngine
from fedray.training.local import Private, learning_rate

KEY = Key(b"7" * 32)
ADAPTERS = {name: OPTIONS[name] for name in ("plain", "ffa", "lora-sb", "abba", "abba, the pair", "ravan")}
ENGINES = [{"backend": "torch"}, *({"zero_stage": s} for s in range(4))]


def private(clip=1.0, noise=1.0, rate=0.2, expected=8.0, *purpose) -> Private:
    return Private(KEY, ("round", *purpose), rate, Mechanism(clip, noise, expected))


def build(make_config, options="plain", task="causal-lm", **more):
    config = make_config(
        task=task,
        **{
            "federation__local_steps": 3,
            "federation__lr": 3e-4,
            "privacy": {"noise": 1.0},
            **ADAPTERS[options],
            **more,
        },
    )
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
    return trainer_and_view(config)


def plain_steps(trainer, view, client, plan) -> dict:
    """The same Poisson batches through an optimizer of PyTorch alone: mean of per-sequence losses over the expected
    batch, no clip, no noise."""
    engine = trainer._load(view, trainer.config.federation, None, None)
    trainer.model.train()
    examples, named = trainer.examples("train", client), engine.parameters
    own = {n: nn.Parameter(view.tensors[n].clone()) for n in named}
    optimizer = torch.optim.AdamW(own.values(), lr=1.0, weight_decay=0.0)
    for step in range(trainer.config.federation.local_steps):
        picked = plan.key.stream("sample", *plan.purpose, step).sample(len(examples), plan.rate)
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(own[name])
        losses = trainer.task.losses(engine.forward, trainer.batch([examples[i] for i in picked]))
        gradients = torch.autograd.grad(losses.sum() / plan.mechanism.expected, list(named.values()))
        for parameter, gradient in zip(own.values(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = learning_rate(trainer.config.federation, 0, step)
        optimizer.step()
    return {n: p.detach() for n, p in own.items()}


# Every adapter with a decoder, two with a classifier.
@pytest.mark.parametrize(
    "options, task", [*((o, "causal-lm") for o in ADAPTERS), ("plain", "classification"), ("abba", "classification")]
)
def test_without_noise_and_clip_a_private_step_is_the_plain_one_in_every_engine(make_config, options, task):
    free, clipped, noisy = private(1e9, 0.0), private(1e-3, 0.0), private(1e-3, 1.0)
    reference = None
    for worker in ENGINES:
        trainer, view = build(
            make_config, options, task, worker={"cpus": 1, **worker}, federation__batch_size=8, federation__accumulate=4
        )
        start = moved(view)
        if reference is None:
            plain = plain_steps(trainer, start, "client-1", free)
            reference = {}
        results = {}
        for name, plan in (("free", free), ("clipped", clipped), ("noisy", noisy)):
            found = trainer.train(start, "client-1", 0, private=plan)
            assert found.loss is None
            results[name] = found.tensors
        assert distance(results["free"], plain) < 1e-6
        assert distance(results["free"], {n: start.tensors[n] for n in plain}) > 1e-4
        assert distance(results["clipped"], results["free"]) > 1e-5
        assert distance(results["noisy"], results["clipped"]) > 1e-5
        reference = reference or results
        for name in results:
            assert distance(results[name], reference[name]) < 1e-6


@pytest.mark.parametrize("options", ADAPTERS)
@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_one_example_more_moves_the_sum_by_the_clip_at_most(make_config, options, task, monkeypatch):
    """Through the client's own steps, with the base model's own dropout left as it comes (0.1 in this encoder)."""
    totals, real = [], ClippedSum.total
    monkeypatch.setattr(ClippedSum, "total", lambda self: totals.append(real(self)) or totals[-1])
    config = make_config(
        task=task,
        worker={"backend": "torch"},
        federation__local_steps=1,
        federation__batch_size=12,
        federation__accumulate=3,
        privacy={"noise": 1.0},
        **ADAPTERS[options],
    )
    trainer, view = trainer_and_view(config)
    clip, every = 1e-3, list(trainer.examples("train", "client-0"))

    def summed(examples) -> torch.Tensor:
        trainer._encoded["train", "client-0"] = examples
        trainer.train(moved(view), "client-0", 0, private=private(clip, 1.0, 1.0))
        return totals[-1]

    whole = summed(every)
    assert torch.equal(whole, summed(every)) and whole.norm() > 1.5 * clip
    order = sorted(range(len(every)), key=lambda i: len(every[i].input_ids))
    for out in (order[0], order[len(order) // 2], order[-1]):
        assert 0.1 * clip < (whole - summed([e for i, e in enumerate(every) if i != out])).norm() <= clip


@pytest.mark.parametrize("options", ADAPTERS)
@pytest.mark.parametrize("case", ["causal-lm", "completion", "classification"])
def test_the_clipped_gradient_is_that_of_a_batch_of_one_loop(make_config, options, case):
    task = "classification" if case == "classification" else "causal-lm"
    more = {"data__completion": "answer"} if case == "completion" else {}
    trainer, view = build(make_config, options, task, worker={"backend": "torch"}, **more)
    engine = trainer._load(moved(view), trainer.config.federation, None, None)
    trainer.model.train()
    examples = trainer.examples("train", "client-0")[:7]
    assert len({len(e.input_ids) for e in examples}) > 2  # ragged, so padded; completions are masked
    alone, norms = [], []
    for example in examples:
        loss = trainer.task.losses(engine.forward, trainer.batch([example])).sum()
        gradients = torch.autograd.grad(loss, list(engine.parameters.values()))
        alone.append(torch.cat([g.double().flatten() for g in gradients]))
        norms.append(alone[-1].norm().item())
    clip = sorted(norms)[3]  # some are clipped, some are not
    # What is clipped ends a millionth below the clip, on purpose.
    wanted = sum(g * min(1.0, clip * (1 - 1e-6) / n) for g, n in zip(alone, norms, strict=True))
    clipped = ClippedSum(engine.parameters, clip)
    with trainer._hooks.awake():
        for part in (examples[:4], examples[4:]):
            losses = trainer.task.losses(engine.forward, trainer.batch(part))
            engine.backward(losses.sum(), False)
            clipped.add(len(part))
    total = clipped.total()
    assert (total - wanted).norm() < 1e-6 * wanted.norm()
    assert not any(p.grad_sample is not None for p in engine.parameters.values())


def test_the_sum_moves_by_no_more_than_the_clip_whatever_one_example_is():
    model = nn.Linear(6, 4)
    hooks, parameters = SampleHooks(model), dict(model.named_parameters())
    x = torch.randn(9, 6) * torch.logspace(-6, 6, 9)[:, None]

    def total(rows):
        clipped = ClippedSum(parameters, 0.5)
        with hooks.awake():
            (model(x[rows]) ** 3).sum().backward()
            clipped.add(len(rows))
        return clipped.total()

    everything = total(list(range(9)))
    for out in range(9):
        assert (everything - total([i for i in range(9) if i != out])).norm() <= 0.5


def test_noise_on_the_mean_has_the_predicted_variance():
    z = noised(torch.zeros(1_000_000, dtype=torch.float64), Mechanism(0.3, 1.7, 32.0), KEY.stream("noise", "v"))
    scaled = (z / (0.3 * 1.7 / 32)).square().sum().item()
    assert 1e-6 < stats.chi2.cdf(scaled, len(z)) < 1 - 1e-6
    assert torch.equal(
        noised(torch.ones(3, dtype=torch.float64), Mechanism(1.0, 0.0, 2.0), None),
        torch.full((3,), 0.5, dtype=torch.float64),
    )


@pytest.mark.parametrize("pair", ["lora+ffa", "lora+fedit", "lora+rolora", "lora-sb+fed-sb", "ravan+fed-sb"])
def test_noise_of_the_clients_adds_up_to_the_predicted_variance(make_config, pair):
    """Three clients of unequal weights take one SGD step on noise alone; a linear method's mean has variance sum p_i^2
    (lr s C / B)^2."""
    kind, name = pair.split("+")
    adapter = {"kind": kind, "rank": {"lora": 8, "lora-sb": 10, "ravan": 5}[kind]} | (
        {"alpha": 4} if kind == "lora" else {"cores": 3} if kind == "ravan" else {}
    )
    config = make_config(
        adapter=adapter,
        method__name=name,
        privacy={"noise": 1.0},
        federation__optimizer="sgd",
        federation__local_steps=1,
        federation__lr=0.5,
        federation__schedule="constant",
        federation__warmup=0.0,
    )
    trainer, _ = trainer_and_view(config)
    method, spec = make_method(config), make_spec(config, trainer.layers, trainer.data.clients)
    state = method.init(spec, trainer.describe()[1], trainer.start_from_weights(spec.adapter))
    view, weights, updates = method.view(spec, state, None), {"client-0": 1.0, "client-1": 2.0, "client-2": 5.0}, []
    for client, weight in weights.items():
        plan = Private(Key(client.encode().ljust(32)), ("round", 0), 1e-12, Mechanism(0.7, 1.3, 4.0))
        found = trainer.train(view, client, 0, private=plan).tensors
        updates.append(Update(client, weight, method.upload(spec, client, found, 0)))
    own = [torch.cat([(u.tensors[n] - view.tensors[n]).flatten() for n in sorted(u.tensors)]) for u in updates]
    assert torch.corrcoef(torch.stack(own)).fill_diagonal_(0.0).abs().max() < 0.1
    after = method.view(spec, method.aggregate(state, updates)[0], None)
    moves = torch.cat([(after.tensors[n] - view.tensors[n]).double().flatten() for n in sorted(updates[0].tensors)])
    for values, share in [(move.double(), 1.0) for move in own] + [
        (moves, sum((w / 8.0) ** 2 for w in weights.values()))
    ]:
        deviation = 0.5 * 1.3 * 0.7 / 4.0 * share**0.5
        assert (
            len(values) > 1000
            and 1e-6 < stats.chi2.cdf((values / deviation).square().sum().item(), len(values)) < 1 - 1e-6
        )


def test_an_empty_poisson_batch_is_a_step_of_noise_in_every_engine(make_config):
    reference = None
    for worker in ENGINES:
        trainer, view = build(make_config, worker={"cpus": 1, **worker}, federation__keep_optimizer=True)
        nothing, some = private(rate=1e-12), private(rate=0.2)
        assert not KEY.stream("sample", *nothing.purpose, 0).sample(100, nothing.rate)
        steps, state = [], None
        for plan in (nothing, some, nothing):
            found = trainer.train(moved(view), "client-1", 0, state, private=plan)
            state = found.optimizer_state
            steps.append(found.tensors)
        assert distance(steps[0], {n: moved(view).tensors[n] for n in steps[0]}) > 1e-4
        reference = reference or steps
        assert max(distance(a, b) for a, b in zip(steps, reference, strict=True)) < 1e-6


def test_noise_differs_between_rounds_and_inputs_and_repeats_for_the_same(make_config):
    trainer, view = build(make_config)
    first = trainer.train(moved(view), "client-1", 0, private=private())
    again = trainer.train(moved(view), "client-1", 0, private=private())
    other = trainer.train(moved(view), "client-1", 0, private=private(1.0, 1.0, 0.2, 8.0, "another digest"))
    assert distance(first.tensors, again.tensors) == 0.0 < distance(first.tensors, other.tensors)


# --- products ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("kind", ["core", "core and bases", "blocks", "blocks and bases", "hadamard"])
def test_sample_gradients_of_products_are_those_of_each_sample_alone(kind, shape):
    torch.manual_seed(0)
    m, n, r = 7, 6, 2
    if kind == "hadamard":
        module = HadamardProduct("A1", "B1", "A2", "B2", {"A1": (r, n), "B1": (m, r), "A2": (3, n), "B2": (m, 3)})
    else:
        one, bases = kind.startswith("core"), kind.endswith("bases")
        h = 1 if one else 3
        shapes = {"A": (h * r, n), "B": (m, h * r), "C": (r, r) if one else (h, r, r)} | ({} if one else {"S": (h,)})
        module = CoreProduct("A", "B", "C", shapes, None if one else "S")
        module.A.requires_grad_(bases)
        module.B.requires_grad_(bases)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    module.double()
    x, g = torch.randn(*shape, n, dtype=torch.float64), torch.randn(*shape, m, dtype=torch.float64)
    module.remember(True)
    module(x)
    found = module.sample_gradients(x, g)
    trained = [p for p in module.parameters() if p.requires_grad]
    assert set(found) == set(trained)
    for i in range(shape[0]):
        alone = torch.autograd.grad((module(x[i : i + 1]) * g[i : i + 1]).sum(), trained)
        assert all(torch.allclose(found[p][i], a, atol=1e-12) for p, a in zip(trained, alone, strict=True))


# --- guards -----------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Merges the batch into one row: no per-sample gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x):
        return self.linear(x.reshape(1, -1, 3))


def test_a_module_that_mixes_samples_stops_the_run():
    model = Mixing()
    hooks, clipped = SampleHooks(model), ClippedSum(dict(model.named_parameters()), 1.0)
    with pytest.raises(PrivacyError, match="no gradient of each sample"), hooks.awake():
        model(torch.randn(4, 3)).sum().backward()
        clipped.add(4)
    with pytest.raises(PrivacyError, match="none"), hooks.awake():
        clipped.add(4)


class Engine(TorchEngine):
    """A TorchEngine over a bare module whose optimizer can be made to misbehave."""

    broken = None

    def forward(self, inputs):
        return self.model(inputs["x"])

    def apply(self, gradients, lr):
        if self.broken == "raw":
            return {n: p.grad.clone() for n, p in self.parameters.items()}
        if self.broken == "still":
            return dict(gradients)
        return super().apply(gradients, lr)


@pytest.fixture
def bare(make_config):
    model = nn.Linear(3, 2)
    engine = Engine(model, dict(model.named_parameters()), make_config().federation)
    return engine, SampleHooks(model)


def step_of(engine, hooks, x, **more):
    losses = more.pop("losses", lambda forward, batch: forward(batch).square().sum(1))
    private_step(
        engine, hooks, [{"x": x}], losses, 0.1, Mechanism(1.0, more.pop("noise", 1.0), 4.0), KEY.stream("n"), True, True
    )


def test_the_step_is_checked_against_what_was_meant(bare):
    engine, hooks = bare
    step_of(engine, hooks, torch.randn(4, 3))
    engine.broken = "raw"
    with pytest.raises(PrivacyError, match="did not step on the private gradient"):
        step_of(engine, hooks, torch.randn(4, 3))
    engine.broken = "still"
    with pytest.raises(PrivacyError, match="did not move"):
        step_of(engine, hooks, torch.randn(4, 3))


def test_what_is_not_finite_adds_nothing_and_stops_nothing(bare):
    """To stop for an example would tell of it, without noise."""
    engine, hooks = bare

    def total(rows, losses=lambda outputs: outputs.sum(1)):
        clipped = ClippedSum(engine.parameters, 1.0)
        with hooks.awake():
            each = losses(engine.forward({"x": torch.tensor(rows)}))
            engine.backward(each.sum(), True)
            clipped.add(len(each))
        return clipped.total(), clipped.not_finite

    alone, none = total([[1.0] * 3])
    beside, left_out = total([[math.nan] * 3, [1.0] * 3, [math.inf] * 3])
    assert torch.equal(alone, beside) and alone.norm() > 0 and (none, left_out) == (0, 2)
    nothing, both = total(
        [[0.0] * 3] * 2, lambda outputs: (outputs.sum(1) * 0).sqrt()
    )  # a loss of 0, a gradient of NaN
    assert not nothing.any() and both == 2
    step_of(engine, hooks, torch.tensor([[math.nan] * 3, [1.0] * 3]))
    step_of(engine, hooks, torch.randn(4, 3))  # and the next step is whole again
    assert all(torch.isfinite(t).all() for t in engine.read().values())


def test_models_without_per_sample_gradients_are_refused_with_the_reason(make_config):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def llama():
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=2,
                vocab_size=20,
                tie_word_embeddings=False,
            )
        )

    with pytest.raises(PrivacyError, match="DoRA"):
        check_model(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], use_dora=True)))
    with pytest.raises(PrivacyError, match="embedding"):
        check_model(get_peft_model(llama(), LoraConfig(target_modules=["embed_tokens", "q_proj"])))
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    check_model(model)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(PrivacyError, match="use_reentrant"):
        check_model(model)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    check_model(model)
    with pytest.raises(PrivacyError, match="over the batch"):
        check_model(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    with pytest.raises(PrivacyError, match="no per-sample gradient"):
        check_model(nn.Sequential(nn.Bilinear(2, 2, 2)))
    assert {CoreProduct, HadamardProduct} <= set(dpsgd.GradSampleHooks.GRAD_SAMPLERS)
