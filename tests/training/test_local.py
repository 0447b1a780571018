"""One client's local work: engines against each other, warm against fresh, schedules, sampling, base weights."""

import gc
import weakref
from itertools import pairwise

import numpy as np
import psutil
import pytest
import torch
from support import OPTIONS, distance, moved, trainer_and_view
from torch import nn

from fedray.adapters import attach
from fedray.lowrank import LowRank
from fedray.methods import View
from fedray.training import local
from fedray.training import model as models
from fedray.training.local import learning_rate
from fedray.training.sampling import sample


# The options do not know the task: every one with a decoder, two with a classifier.
@pytest.mark.parametrize(
    "options, task",
    [*((o, "causal-lm") for o in OPTIONS), ("plain", "classification"), ("accumulate", "classification")],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gives_the_adapters_of_plain_pytorch(make_config, stage, options, task):
    # Rounding differs where DeepSpeed computes the norm for clipping, and where stage 3 adds gradients at forks in
    # another order. Adam's first steps divide by |g| and magnify that up to the learning rate where g is nearly 0: a
    # usual rate here.
    common = {"task": task, "federation__local_steps": 4, "federation__lr": 3e-4, **OPTIONS[options]}
    results = []
    for worker in ({"worker__backend": "torch"}, {"worker__backend": "deepspeed", "worker__zero_stage": stage}):
        trainer, view = trainer_and_view(make_config(**common, **worker))
        first = trainer.train(moved(view), "client-1", 0)
        second = trainer.train(moved(view, 1), "client-0", 1)  # the engine is warm now
        results.append((first, second))
    for plain, deep in zip(*results, strict=True):
        assert distance(plain.tensors, deep.tensors) < 1e-6
        assert plain.loss == pytest.approx(deep.loss, abs=1e-6)
        assert plain.examples == deep.examples
    assert (
        distance(results[0][0].tensors, {n: moved(view).tensors[n] for n in results[0][0].tensors}) > 1e-4
    )  # it did train


@pytest.mark.parametrize("worker", [{"backend": "torch"}, *({"zero_stage": s} for s in range(4))], ids=str)
def test_a_warm_engine_equals_a_fresh_one_to_the_last_bit(make_config, worker):
    config = make_config(worker={"cpus": 1, **worker}, method__name="fedex")
    trainer, view = trainer_and_view(config)
    base = {layer.name: LowRank(torch.randn(layer.m, 2), torch.randn(2, layer.n)) for layer in trainer.layers}
    trainer.train(View(moved(view).tensors, base, view.trained), "client-0", 0)
    warm = trainer.train(view, "client-2", 1)
    fresh = trainer_and_view(config)[0].train(view, "client-2", 1)
    assert distance(warm.tensors, fresh.tensors) == 0.0 and warm.loss == fresh.loss


@pytest.mark.parametrize("worker", [{"backend": "torch"}, *({"zero_stage": s} for s in range(4))], ids=str)
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_kept_optimizer_state_goes_on_where_it_stopped(make_config, worker, optimizer):
    """Two rounds of 2 steps with the state handed over are one round of 4 steps."""
    options = {
        "worker": {"cpus": 1, **worker},
        "federation__optimizer": optimizer,
        "federation__schedule": "constant",
        "federation__warmup": 0.0,
        "federation__keep_optimizer": True,
    }
    trainer, view = trainer_and_view(make_config(**options, federation__local_steps=2))
    first = trainer.train(view, "client-0", 0)
    trainer.train(moved(view), "client-1", 0)  # another client in between, on the same worker
    second = trainer.train(View(view.tensors | first.tensors, {}, view.trained), "client-0", 1, first.optimizer_state)
    forgot = trainer.train(View(view.tensors | first.tensors, {}, view.trained), "client-0", 1)
    whole = trainer_and_view(make_config(**options, federation__local_steps=4))[0].train(view, "client-0", 0)
    fresh, _ = trainer_and_view(make_config(**options, federation__local_steps=2))  # as after a kill
    third = fresh.train(View(view.tensors | first.tensors, {}, view.trained), "client-0", 1, first.optimizer_state)
    assert distance(second.tensors, whole.tensors) < 1e-6
    assert distance(second.tensors, third.tensors) == 0.0
    if optimizer == "adamw":
        assert distance(forgot.tensors, whole.tensors) > 1e-5


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_update_is_written_from_the_original_weights_and_its_loss_is_measured(make_config, dtype, stage):
    trainer, view = trainer_and_view(make_config(model__dtype=dtype, worker__zero_stage=stage))
    g = torch.Generator().manual_seed(1)
    updates = [
        {
            la.name: LowRank(1e-2 * torch.randn(la.m, 2, generator=g), torch.randn(2, la.n, generator=g))
            for la in trainer.layers
        }
        for _ in range(3)
    ]
    plain = trainer.train(view, "client-0", 0)
    for update in updates:
        lost = trainer.train(View(view.tensors, update, view.trained), "client-0", 0).base_lost
        relative = lost / sum(u.norm() ** 2 for u in update.values()) ** 0.5
        assert relative < 1e-6 if dtype == "float32" else 1e-3 < relative < 0.2
    assert distance(trainer.train(view, "client-0", 0).tensors, plain.tensors) == 0.0  # back to W0, to the bit
    assert all(p.dtype == torch.float32 for p in attach.factors(trainer.model).values())


def test_base_weights_move_the_logits_as_the_dense_update_does(make_config):
    trainer, view = trainer_and_view(make_config())
    base = {layer.name: LowRank(torch.randn(layer.m, 2) / 9, torch.randn(2, layer.n) / 9) for layer in trainer.layers}
    inputs = {"input_ids": torch.randint(3, 200, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    got = trainer.logits(View(view.tensors, base, view.trained), inputs)
    plain = models.load_base(trainer.config).eval()
    for name, delta in base.items():
        dict(plain.named_modules())[name].weight.data += delta.dense()
    torch.testing.assert_close(got, plain(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_the_base_is_loaded_once_in_a_workers_life(make_config, monkeypatch):
    loads = []
    monkeypatch.setattr(models, "load_base", lambda *a, real=models.load_base: (loads.append(a), real(*a))[1])
    trainer, view = trainer_and_view(make_config())
    for round in range(3):
        for client in ("client-0", "client-1"):
            trainer.train(view, client, round)
        trainer.evaluate(view, "test", "", (0, 1))
    assert len(loads) == 1


def test_schedules(make_config):
    def rates(**options):
        section = make_config(**{f"federation__{k}": v for k, v in options.items()}).federation
        return [learning_rate(section, r, s) for r in range(section.rounds) for s in range(section.local_steps)]

    common = dict(lr=1.0, rounds=2, local_steps=5)
    assert rates(**common, schedule="constant", warmup=0.0) == [1.0] * 10
    assert rates(**common, schedule="constant", warmup=0.2) == [0.5, 1.0] + [1.0] * 8
    assert rates(**common, schedule="linear", warmup=0.0) == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(**common, schedule="linear", warmup=0.2, schedule_over="round") == pytest.approx(
        [1.0, 1.0, 0.75, 0.5, 0.25] * 2
    )
    cosine = rates(**common, schedule="cosine", warmup=0.1)
    assert cosine[:2] == [1.0, 1.0] and cosine[-1] == pytest.approx(
        (1 - torch.cos(torch.tensor(torch.pi / 9)).item()) / 2
    )
    assert all(a >= b for a, b in pairwise(cosine[1:]))


def test_sampling_visits_every_example_once_an_epoch_and_needs_no_state():
    drawn = [i for step in range(7) for i in sample(14, 4, step, 0, "data", "a")]
    assert (
        sorted(drawn[:14]) == list(range(14)) and sorted(drawn[14:28]) == list(range(14)) and drawn[:14] != drawn[14:28]
    )
    assert sample(14, 4, 5, 0, "data", "a") == drawn[20:24]
    assert sample(14, 4, 5, 0, "data", "b") != drawn[20:24]
    assert len(sample(3, 8, 0, 1)) == 8  # fewer examples than a batch: they repeat


@pytest.mark.parametrize("examples, batch", [(203, 4), (64, 8), (3, 8), (5, 5)])
def test_batches_of_similar_lengths_take_each_example_once_an_epoch(examples, batch):
    lengths = np.random.default_rng(0).integers(1, 200, examples)
    steps = -(-3 * examples // batch)
    drawn = [sample(examples, batch, step, 0, "a", lengths=lengths) for step in range(steps)]
    flat = [i for each in drawn for i in each]
    for epoch in range(3):
        assert sorted(flat[epoch * examples : (epoch + 1) * examples]) == list(range(examples))
    assert drawn[1] == sample(examples, batch, 1, 0, "a", lengths=lengths)

    def padding(batches):
        return sum(max(lengths[i] for i in each) * len(each) - sum(lengths[i] for i in each) for each in batches)

    if examples > 10 * batch:
        assert padding(drawn) < 0.3 * padding([sample(examples, batch, step, 0, "a") for step in range(steps)])
        starts = [lengths[each[0]] for each in drawn[: examples // batch]]
        assert starts != sorted(starts)  # the batches themselves are mixed


def test_batches_of_similar_length_hold_the_same_examples(make_config, monkeypatch):
    seen = {}
    for accumulate in (1, 2):
        trainer, view = trainer_and_view(make_config(federation__accumulate=accumulate, federation__local_steps=1))
        batches = []
        real = trainer.task.collate
        monkeypatch.setattr(
            local.LocalTrainer, "batch", lambda self, rows, b=batches, real=real: (b.extend(rows), real(rows))[1]
        )
        trainer.train(view, "client-0", 0)
        seen[accumulate] = sorted(tuple(e.input_ids) for e in batches)
        monkeypatch.undo()
    assert seen[1] == seen[2]


def test_a_loss_that_is_not_finite_stops_the_client(make_config):
    trainer, view = trainer_and_view(make_config(worker__backend="torch"))
    broken = View({n: torch.full_like(t, float("inf")) for n, t in view.tensors.items()}, {}, view.trained)
    with pytest.raises(FloatingPointError, match="at local step 1 of round 1: lower federation.lr"):
        trainer.train(broken, "client-0", 0)


def test_adapters_are_identical_on_every_worker_and_scale_is_the_adapters_own(make_config):
    config = make_config(adapter={"rank": 4, "alpha": 6, "rslora": True, "targets": ["q_proj", "down_proj"]})
    one, other = trainer_and_view(config), trainer_and_view(config)
    assert distance(one[1].tensors, other[1].tensors) == 0.0
    assert {layer.scale for layer in one[0].layers} == {3.0}
    assert {layer.name.rsplit(".", 1)[1] for layer in one[0].layers} == {"q_proj", "down_proj"}
    assert {(layer.m, layer.n) for layer in one[0].layers} == {(32, 32), (32, 48)}


def test_an_engine_takes_memory_for_what_trains_and_no_more(make_config):
    """DeepSpeed's own bucket is 2 GB, made anew with each engine: on a GPU they are real."""
    trainer, view = trainer_and_view(make_config(worker={"cpus": 1, "zero_stage": 3}))
    trainer.train(view, "client-0", 0)
    before = psutil.Process().memory_info().vms
    trainer.reset()
    trainer.train(view, "client-0", 1)
    assert psutil.Process().memory_info().vms - before < 500 * 2**20


def test_heads_are_trained_whole(make_config):
    trainer, view = trainer_and_view(make_config(task="classification"))
    assert {"classifier.weight", "classifier.bias"} <= view.tensors.keys()
    after = trainer.train(view, "client-0", 0).tensors
    assert not torch.equal(after["classifier.weight"], view.tensors["classifier.weight"])
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained) and isinstance(trainer.model, nn.Module)


def test_the_bases_own_dropout_can_be_switched_off(make_config):
    losses = {}
    for dropout in (None, 0.0):
        trainer, view = trainer_and_view(make_config(task="classification", model__dropout=dropout))
        probabilities = {m.p for m in trainer.model.modules() if isinstance(m, nn.Dropout)}
        assert (0.1 in probabilities) == (dropout is None)
        losses[dropout] = trainer.train(view, "client-0", 0).loss
    assert losses[None] != losses[0.0]


def test_heads_train_in_fp32_on_a_bf16_base(make_config):
    trainer, view = trainer_and_view(make_config(task="classification", model__dtype="bfloat16", federation__lr=1e-4))
    after = trainer.train(view, "client-0", 0).tensors["classifier.weight"]
    assert all(p.dtype == torch.float32 for p in attach.heads(trainer.model).values())
    assert (after != view.tensors["classifier.weight"]).all()  # bf16 would round most of these steps away


def test_a_decoders_head_reads_the_same_token_however_much_is_padded(make_config, tiny):
    config = make_config(task="classification")
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(tiny / "llama-other-pad")})}
    )
    trainer, view = trainer_and_view(config)
    alone = trainer.task.tokenizer(["good bad"], return_tensors="pt")
    padded = trainer.task.tokenizer(["good bad", "good " * 5], padding=True, return_tensors="pt")
    one = trainer.logits(view, {k: alone[k] for k in ("input_ids", "attention_mask")})
    two = trainer.logits(view, {k: padded[k] for k in ("input_ids", "attention_mask")})
    torch.testing.assert_close(one[0], two[0], rtol=1e-5, atol=1e-5)


def test_heads_have_no_adapters_inside():
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        RobertaConfig,
        RobertaForSequenceClassification,
    )

    from fedray.config.sections import AdapterSection

    small = dict(vocab_size=99, num_labels=3)
    distil = DistilBertForSequenceClassification(
        DistilBertConfig(**small, dim=32, n_layers=1, n_heads=2, hidden_dim=48)
    )
    roberta = RobertaForSequenceClassification(
        RobertaConfig(**small, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    )
    for model, heads in (
        (distil, {"pre_classifier", "classifier"}),
        (roberta, {"classifier.dense", "classifier.out_proj"}),
    ):
        wrapped = attach.attach(model, AdapterSection(rank=2), "classification")
        assert {n.rsplit(".", 1)[0] for n in attach.heads(wrapped)} == heads
        assert len(attach.layers(wrapped)) >= 6 and not any(
            "classifier" in layer.name for layer in attach.layers(wrapped)
        )


def test_fedprox_adds_the_pull_towards_the_broadcast_to_every_gradient(make_config):
    """Against the loss with mu/2 ||w - w0||^2 in it, by plain SGD steps of our own; heads are pulled too."""
    mu, lr = 0.7, 0.3
    common = {
        "task": "classification",
        "federation__optimizer": "sgd",
        "federation__lr": lr,
        "federation__local_steps": 5,
        "model__dropout": 0.0,
        "federation__max_grad_norm": None,
        "federation__schedule": "constant",
        "federation__warmup": 0.0,
        "worker__backend": "torch",
    }
    trainer, view = trainer_and_view(make_config(**common, federation__proximal=mu))
    pulled = trainer.train(view, "client-1", 0).tensors
    free, view = trainer_and_view(make_config(**common))
    assert distance(pulled, free.train(view, "client-1", 0).tensors) > 1e-3

    free._load(view, free.config.federation, None, None)
    free.model.train()
    parameters = free._engine.parameters
    start = {n: p.detach().clone() for n, p in parameters.items()}
    examples = free.examples("train", "client-1")
    for step in range(5):
        batch = free.batch([examples[i] for i in sample(len(examples), 4, step, 0, "data", "client-1")])
        loss = free.task.loss(free._engine.forward, batch) + mu / 2 * sum(
            (p - start[n]).square().sum() for n, p in parameters.items()
        )
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                parameter -= lr * gradient
    assert distance(pulled, {n: p.detach() for n, p in parameters.items()}) < 1e-6


@pytest.mark.parametrize("worker", [{"backend": "torch"}, *({"zero_stage": s} for s in range(4))], ids=str)
def test_a_step_that_failed_leaves_nothing_to_the_next_client(make_config, worker):
    """Its gradients were made, and not stepped on."""
    config = make_config(worker={"cpus": 1, **worker}, federation__accumulate=2)
    trainer, view = trainer_and_view(config)
    real, calls = trainer.task.loss, []

    def fails(forward, batch):
        calls.append(1)
        if len(calls) == 2:  # after the first micro-batch's backward pass
            raise RuntimeError("out of luck")
        return real(forward, batch)

    object.__setattr__(trainer.task, "loss", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.train(moved(view), "client-0", 0)
    trainer.reset()
    after = trainer.train(moved(view), "client-1", 0)
    alone = trainer_and_view(config)[0].train(moved(view), "client-1", 0)
    assert distance(after.tensors, alone.tensors) == 0.0 and after.loss == alone.loss


@pytest.mark.parametrize("stage", range(4))
def test_engines_that_are_done_with_are_let_go(make_config, stage):
    """rolora changes what trains every round, and so the engine."""
    config = make_config(worker={"cpus": 1, "zero_stage": stage}, method__name="rolora")
    trainer, view = trainer_and_view(config)
    engines = weakref.WeakSet()
    for round in range(6):
        trained = ("lora_A", "lora_B")[round % 2 : round % 2 + 1]
        trainer.train(View(view.tensors, view.base, trained), "client-0", round)
        engines.add(trainer._engine.engine)
    gc.collect()
    assert len(engines) == 1


@pytest.mark.parametrize("stage", range(4))
def test_an_engine_that_is_collected_late_takes_nothing_from_the_next(make_config, stage):
    config = make_config(worker={"cpus": 1, "zero_stage": stage}, method__name="rolora")
    trainer, view = trainer_and_view(config)

    def trains(trainer, factor):
        return trainer.train(View(moved(view).tensors, view.base, (factor,)), "client-0", 1)

    gc.disable()
    try:
        trains(trainer, "lora_A")
        trains(trainer, "lora_B")  # another engine over parameters that the first one has had
        trains(trainer, "lora_A")
    finally:
        gc.enable()
    gc.collect()
    after, alone = trains(trainer, "lora_A"), trains(trainer_and_view(config)[0], "lora_A")
    assert distance(after.tensors, alone.tensors) == 0.0
