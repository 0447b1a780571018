"""DP-SGD (Abadi et al., CCS 2016) over an engine's step: per-sample gradients, clipped, summed, noised once, divided
by the expected batch.

Opacus's hooks compute the per-sample gradients without wrapping the model. Noise is added to the sum of the clipped
gradients after it is complete (over micro-batches, and over a client's ranks: once, by the first) and handed to the
engine as the whole gradient, through DeepSpeed's own `safe_set_full_grad`: ZeRO 1 and 2 step on flat buffers of their
own, and silently ignore what is written to `parameter.grad`.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from torch import Tensor, nn

from fedray.adapters.modules import CoreProduct, HadamardProduct, Product, whole_shape
from fedray.errors import PrivacyError
from fedray.privacy.keys import Stream
from fedray.privacy.model_checks import check_model, each_alone
from fedray.privacy.plan import Mechanism
from fedray.privacy.private import Watch
from fedray.ranks import ALONE, Ranks

Losses = Callable[[Callable, dict], Tensor]

for _product in (CoreProduct, HadamardProduct):
    register_grad_sampler(_product)(
        lambda module, activations, backprops: module.sample_gradients(activations[0], backprops)
    )


class Engine(Protocol):
    """What a private step needs of an engine (`fedray.training.engine`)."""

    model: nn.Module
    parameters: dict[str, nn.Parameter]

    def forward(self, inputs: dict) -> Tensor: ...
    def backward(self, value: Tensor, last: bool) -> None: ...
    def apply(self, gradients: dict[str, Tensor], lr: float) -> dict[str, Tensor]: ...
    def read(self) -> dict[str, Tensor]: ...


class SampleHooks:
    """Opacus's hooks on all that trains in a model, asleep until a private step. Raises PrivacyError as `check_model`
    does."""

    def __init__(self, model: nn.Module):
        check_model(model)
        self._hooks = GradSampleHooks(model, strict=True, loss_reduction="sum")
        self._modules = list(model.modules())
        self._hooks.disable_hooks()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Training passes leave per-sample gradients; whatever a pass that failed left behind is cleared."""
        products = [m for m in self._modules if isinstance(m, Product)]
        self._hooks.enable_hooks()
        for product in products:
            product.remember(True)
        try:
            with warnings.catch_warnings():  # modules that see token numbers have no input gradients, which is no harm
                warnings.filterwarnings("ignore", "Full backward hook is firing")
                yield
        finally:
            self._hooks.disable_hooks()
            for product in products:
                product.remember(False)
            for module in self._modules:
                for left in ("activations", "max_batch_len"):
                    module.__dict__.pop(left, None)  # PEFT's wrappers show their inner module's attributes as their own
                for parameter in module.parameters(recurse=False):
                    _forget(parameter)

    def close(self) -> None:
        """Take the hooks off."""
        self._hooks.cleanup()


def _forget(parameter: Any) -> None:
    """Clear what opacus, beyond torch's own attributes, keeps at a parameter during a pass."""
    if hasattr(parameter, "_forward_counter"):
        parameter._forward_counter, parameter.grad_sample = 0, None


class ClippedSum:
    """The sum of per-sample gradients, each clipped to a norm over all parameters together; fp64, in order of the
    parameters."""

    def __init__(self, parameters: dict[str, nn.Parameter], clip: float):
        self.parameters, self.clip = parameters, clip
        self._sums: dict[str, Tensor] = {}
        self.not_finite = 0

    @torch.no_grad()
    def add(self, samples: int) -> None:
        """Take the per-sample gradients that a backward pass left, and clear them. Raises PrivacyError where they are
        not one for each of `samples`."""
        taken = {name: self._take(name, p, samples) for name, p in self.parameters.items()}
        norms = torch.stack(
            [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) for g in taken.values()]
        ).norm(dim=0)
        # Of a gradient that is not finite nothing is taken: to stop for it would tell of the example, without noise.
        finite = torch.isfinite(norms)
        self.not_finite += int((~finite).sum())
        # A millionth below: what fp32 rounds up may not pass the clip.
        factors = torch.where(finite, self.clip * (1 - 1e-6) / norms.clamp_min(1e-30), 0.0).clamp_max(1.0)
        for name, gradient in taken.items():
            rows = gradient.flatten(1)
            rows = rows if finite.all() else rows.masked_fill(~finite[:, None], 0.0)
            part = (factors.to(gradient.dtype) @ rows).double()
            self._sums[name] = self._sums[name].add_(part) if name in self._sums else part

    @staticmethod
    def _take(name: str, parameter: Any, samples: int) -> Tensor:
        """The gradient that opacus left at a parameter, which is cleared."""
        gradient, parameter.grad_sample = getattr(parameter, "grad_sample", None), None
        shape = (samples, *whole_shape(parameter))
        if not torch.is_tensor(gradient) or tuple(gradient.shape) != shape:
            # No shapes: how many samples there are is private.
            have = (
                "none" if gradient is None else "several" if not torch.is_tensor(gradient) else "one of another shape"
            )
            raise PrivacyError(
                f"{name} has no gradient of each sample ({have} found): its module does not keep samples apart, "
                "so no noise would make it private; leave it out of adapter.targets or adapter.heads"
            )
        return gradient

    def total(self) -> Tensor:
        """The sum as one fp64 vector on the CPU; zeros where no sample came."""
        return torch.cat(
            [
                self._sums[name].cpu()
                if name in self._sums
                else torch.zeros(math.prod(whole_shape(p)), dtype=torch.float64)
                for name, p in self.parameters.items()
            ]
        )


def noised(total: Tensor, mechanism: Mechanism, noise: Stream | None) -> Tensor:
    """(total + noise) / expected, fp64. `noise`: standard normals, asked for as many as there are numbers; None only
    where noise is 0."""
    if mechanism.noise > 0:
        if noise is None:
            raise ValueError("a mechanism with noise needs random numbers")
        total = total + noise.normals(len(total)).mul_(mechanism.noise * mechanism.clip)
    return total / mechanism.expected


def clipped_sum(
    engine: Engine, hooks: SampleHooks, micro_batches: Sequence[dict], losses: Losses, clip: float
) -> ClippedSum:
    """The sum of a Poisson batch's clipped gradients, before its noise. Raises PrivacyError as `private_step` does."""
    clipped = ClippedSum(engine.parameters, clip)
    with hooks.awake():
        for i, batch in enumerate(micro_batches):
            with each_alone(engine.model):
                each = losses(engine.forward, batch)
            engine.backward(each.sum(), i == len(micro_batches) - 1)
            clipped.add(len(each))
    return clipped


def private_step(
    engine: Engine,
    hooks: SampleHooks,
    micro_batches: Sequence[dict],
    losses: Losses,
    lr: float,
    mechanism: Mechanism,
    noise: Stream | None,
    check: bool,
    first: bool = False,
    watch: Watch | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """One optimizer step on a Poisson batch, cut into micro-batches (none, when it is empty: then the step is noise
    alone).

    `losses(forward, batch)`: one loss a sequence, each over its own tokens. `check`: hold what the optimizer got
    against what was meant; `first`: see that every parameter moved, too (late in a schedule a rate may be too small
    to). `watch`: an audit's. `ranks`: those of the client, of which the micro-batches are this one's parts; only the
    first needs `noise`. An example whose gradient is not finite adds nothing. Raises
    PrivacyError when the step was not a private one.
    """
    clipped = clipped_sum(engine, hooks, micro_batches, losses, mechanism.clip)
    before = engine.read() if check else {}
    total = ranks.sum(clipped.total())
    if clipped.not_finite:  # in this machine's own log: how many is private
        logging.getLogger("fedray").warning("%s gradients were not finite, and are left out", clipped.not_finite)
    if watch is not None:
        watch.before(split(total, engine.parameters))
    mean = ranks.from_first(lambda: noised(total, mechanism, noise))
    if watch is not None:
        watch.after(split(mean, engine.parameters))
    gradients = _by_name(mean, engine.parameters)
    got = engine.apply(gradients, lr)
    if check:
        _check(gradients, got, before, engine.read(), first and mechanism.noise > 0 and lr > 0)


def split(vector: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The one vector as views of each parameter's shape."""
    parts, offset = {}, 0
    for name, parameter in parameters.items():
        shape = whole_shape(parameter)
        parts[name] = vector[offset : offset + math.prod(shape)].reshape(shape)
        offset += math.prod(shape)
    return parts


def _by_name(mean: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The one vector as fp32 gradients of the parameters, on their devices."""
    return {n: t.to(parameters[n].device, torch.float32) for n, t in split(mean, parameters).items()}


def _check(
    wanted: dict[str, Tensor], got: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor], noisy: bool
) -> None:
    for name, gradient in wanted.items():
        if not torch.equal(got[name].reshape(-1).cpu(), gradient.reshape(-1).cpu()):
            raise PrivacyError(
                f"the optimizer did not step on the private gradient of {name}: the run stops, since its noise was lost"
            )
        if noisy and torch.equal(before[name], after[name]):
            raise PrivacyError(
                f"{name} did not move in a private step, whose noise moves everything that trains: "
                "the run stops (federation.lr may be too small to move an fp32 number)"
            )
