"""The gradient of the frozen weights over a client's examples, for LoRA-SB's bases: as sketches, or a few layers at a
time.

For a linear layer with inputs X (T x n) and gradients D (T x m) of its outputs, the weight's gradient is G = D^T X.
Sketches need only D^T (X Omega) and (D Q)^T X, so m x n is never formed, here or anywhere; only the sign of the sum
(the authors' choice) needs G itself.

Private sketches: each example's sketch of each layer is scaled to norm 1 / sqrt(layers), so that adding or removing
an example moves the whole by 1 at most whatever its gradient is; Gaussian noise joins the sum in the sketch's own,
small, space. Only the space that the sum spans is used, so nothing is lost with the scale but the examples' own
weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fedray import seeding
from fedray.adapters import attach
from fedray.adapters.base import Layer, sketch_columns
from fedray.data.tasks import Example
from fedray.privacy.private import SketchNoise

if TYPE_CHECKING:
    from fedray.training.local import LocalTrainer

Accumulate = Callable[[str, Tensor, Tensor], None]


def dense(trainer: LocalTrainer, examples: Sequence[Example], layers: Sequence[str]) -> dict[str, Tensor]:
    """G (m x n, fp32, CPU) of the named layers: the mean over the examples of each one's gradient."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x_tn: Tensor, d_tm: Tensor) -> None:
        sums[name] = sums[name].addmm_(d_tm.T, x_tn) if name in sums else d_tm.T @ x_tn

    _pass(trainer, examples, layers, add)
    for layer in (one for one in trainer.layers if one.name in layers and one.name not in sums):
        sums[layer.name] = torch.zeros(layer.m, layer.n)  # no example came by (an expert that none was sent to)
    return {name: (total / len(examples)).cpu() for name, total in sums.items()}


def gaussian_tests(layers: Sequence[Layer], oversample: int, seed: int) -> dict[str, Tensor]:
    """Omega (n x q, q = rank + `oversample`) of every layer, from the seed: the same for all clients."""
    tests = {}
    for layer in layers:
        q = sketch_columns(layer, oversample)
        tests[layer.name] = torch.randn(layer.n, q, generator=seeding.generator(seed, layer.name, "range"))
    return tests


def range_sketch(
    trainer: LocalTrainer, examples: Sequence[Example], tests_nq: Mapping[str, Tensor], noise: SketchNoise | None = None
) -> dict[str, Tensor]:
    """G Omega (m x q) of every layer in `tests_nq`; linear in G, so clients' sketches add up. `examples`: with noise,
    a Poisson sample."""
    return _sketch(
        trainer,
        examples,
        tests_nq,
        lambda test, x_tn, d_tm: d_tm.T @ (x_tn @ test),
        lambda layer, q: (layer.m, q),
        noise,
    )


def row_sketch(
    trainer: LocalTrainer, examples: Sequence[Example], bases_mq: Mapping[str, Tensor], noise: SketchNoise | None = None
) -> dict[str, Tensor]:
    """Q^T G (q x n) of every layer in `bases_mq`; linear too."""
    return _sketch(
        trainer,
        examples,
        bases_mq,
        lambda basis, x_tn, d_tm: (d_tm @ basis).T @ x_tn,
        lambda layer, q: (q, layer.n),
        noise,
    )


def _sketch(
    trainer: LocalTrainer,
    examples: Sequence[Example],
    sides: Mapping[str, Tensor],
    product: Callable[[Tensor, Tensor, Tensor], Tensor],
    shape: Callable[[Layer, int], tuple[int, int]],
    noise: SketchNoise | None,
) -> dict[str, Tensor]:
    sides = {name: side.to(trainer.device) for name, side in sides.items()}
    shapes = {layer.name: shape(layer, sides[layer.name].shape[1]) for layer in trainer.layers if layer.name in sides}
    sums: dict[str, Tensor] = {}

    def add(name: str, x_tn: Tensor, d_tm: Tensor) -> None:
        part = product(sides[name], x_tn, d_tm)
        sums[name] = sums[name].add_(part) if name in sums else part

    def sketch(some: Sequence[Example]) -> None:
        _pass(trainer, some, list(sides), add)

    if noise is not None:
        return _noised(_scaled_sum(examples, sketch, sums, shapes), noise)
    sketch(examples)
    # No example came by some layer (an expert that none was sent to).
    return {
        name: (sums[name] / len(examples)).cpu() if name in sums else torch.zeros(size) for name, size in shapes.items()
    }


def _scaled_sum(
    examples: Sequence[Example],
    sketch: Callable[[Sequence[Example]], None],
    sums: dict[str, Tensor],
    shapes: dict[str, tuple[int, int]],
) -> dict[str, Tensor]:
    """The sum over the examples of each one's sketches, each scaled to norm 1 / sqrt(layers); fp64. `sketch` leaves an
    example's sketches in `sums`, which is empty again afterwards. A sketch that is not finite adds nothing.
    """
    total = {name: torch.zeros(size, dtype=torch.float64) for name, size in shapes.items()}
    for example in examples:
        sketch([example])
        for name, part in sums.items():
            size = torch.linalg.vector_norm(part, dtype=torch.float64)
            if not torch.isfinite(size):  # to stop for it would tell of the example, without noise
                continue
            # A millionth below: what fp32 rounds up may not pass 1.
            total[name] += (part.double() * ((1 - 1e-6) / (size.clamp_min(1e-30) * math.sqrt(len(shapes))))).cpu()
        sums.clear()
    return total


def _noised(total: dict[str, Tensor], noise: SketchNoise) -> dict[str, Tensor]:
    """(total + normals) / expected, fp32; drawn in order of the names."""
    if noise.watch is not None:
        noise.watch.before(total)
    drawn = {name: noise.stream.normals(t.numel()).reshape(t.shape) for name, t in sorted(total.items())}
    answer = {name: ((t + noise.deviation * drawn[name]) / noise.expected).float() for name, t in total.items()}
    if noise.watch is not None:
        noise.watch.after(answer)
    return answer


def _pass(trainer: LocalTrainer, examples: Sequence[Example], layers: Sequence[str], add: Accumulate) -> None:
    """Forward and backward passes over batches, for the sum of the sequences' own losses: each sequence counts alike,
    so that a weighted mean over clients is the mean over all examples. Padding adds nothing: no loss depends on it.

    In evaluation mode (no dropout), and in fp32 from the hooks on.
    """
    trainer.set_mode(training=False)
    size = trainer.config.federation.micro_batch  # what the run's own steps have memory for
    ordered = sorted(examples, key=lambda e: len(e.input_ids))
    with _hooked(trainer.model, layers, add):
        for first in range(0, len(ordered), size):
            batch = {
                name: tensor.to(trainer.device)
                for name, tensor in trainer.task.collate(ordered[first : first + size]).items()
            }
            losses = trainer.task.losses(
                lambda inputs: trainer.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits, batch
            )
            losses.sum().backward()
    trainer.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _hooked(model: PeftModel, layers: Sequence[str], add: Accumulate) -> Iterator[None]:
    """Calls `add(layer, X, D)` in every backward pass. The embeddings are made to ask for gradients, so that the
    first layer has them."""

    def watch(name: str, module: nn.Module) -> RemovableHandle:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            output.register_hook(
                lambda d: add(name, x.reshape(-1, x.shape[-1]).float(), d.reshape(-1, d.shape[-1]).float())
            )

        return module.register_forward_hook(forward)

    bases = attach.base_layers(model)
    base = model.get_base_model()
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"{type(base).__name__} is no model of transformers: its embeddings cannot be found")
    embeddings = base.get_input_embeddings()
    handles = [embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))]
    handles += [watch(name, bases[name]) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
