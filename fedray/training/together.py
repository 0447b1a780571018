"""Cohort batching: several clients' steps in one forward and one backward pass over the base that they share.

The batches of c clients stand one after the other: c b sequences, client by client. The base's weights see them as one
batch; each adapted layer adds each client's own product (`Adapter.together`), each head runs by client. The sum of the
clients' losses has as gradient of a client's factors that client's own gradient, so each steps as if it were alone:
own clip, own dropout, own failure. Numbers differ from theirs alone only as sums in another order do.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedray import seeding
from fedray.adapters import attach
from fedray.config.build import make_adapter
from fedray.config.sections import FederationSection
from fedray.data.tasks import Example
from fedray.data.tasks.tokens import with_targets
from fedray.methods import View
from fedray.methods.state import Tensors
from fedray.training.engine import Proximal, make_optimizer, set_rate
from fedray.training.local import LocalResult, LocalTrainer, flaw_of_loss, learning_rate


def train_together(
    trainer: LocalTrainer, views: Mapping[str, View], round: int, base_key: Any
) -> dict[str, LocalResult | Exception]:
    """`LocalTrainer.train` for each of these clients, who share a base, or what it would raise; those together whose
    sections are alike."""
    results: dict[str, LocalResult | Exception] = {}
    alike: list[tuple[FederationSection, dict[str, View]]] = []
    for client, view in views.items():
        try:
            trainer.examples("train", client)
        except Exception as error:  # noqa: BLE001 - whatever a client's data raise is that client's failure
            results[client] = error
            continue
        section = trainer.config.client(client)
        members = next((members for other, members in alike if other == section), None)
        if members is None:
            alike.append((section, members := {}))
        members[client] = view
    for section, members in alike:
        results |= _train_alike(trainer, section, members, round, base_key)
    return results


def _train_alike(
    trainer: LocalTrainer, config: FederationSection, views: Mapping[str, View], round: int, base_key: Any
) -> dict[str, LocalResult | Exception]:
    started, clients = time.monotonic(), list(views)
    first = views[clients[0]]
    trainer.load_base(first, base_key)
    trainer.set_mode(training=True)
    trained = trainer.trained(first)
    together = Together(
        trainer,
        config,
        trained=[{name: view.tensors[name] for name in trained} for view in views.values()],
        frozen=[{n: view.tensors[n] for n in trainer.factors if n not in trained} for view in views.values()],
        seeds=[seeding.derive(trainer.config.seed, "dropout", client, round) for client in clients],
    )
    losses, failed = _steps(trainer, together, config, clients, round)
    seconds = (time.monotonic() - started) / len(clients)
    done: dict[str, LocalResult | Exception] = {}
    for client, tensors, loss in zip(clients, together.read(), losses, strict=True):
        examples = len(trainer.examples("train", client))
        done[client] = LocalResult(tensors, examples, loss, {}, trainer.base_lost, seconds, trainer.shortened(client))
    return done | failed


def _steps(
    trainer: LocalTrainer, together: Together, config: FederationSection, clients: Sequence[str], round: int
) -> tuple[list[float], dict[str, Exception]]:
    """Each client's mean loss, and who failed: what a client's numbers have become does not reach the others'."""
    losses: list[list[float]] = []
    failed: dict[str, Exception] = {}
    with together.attached():
        for step in range(config.local_steps):
            micro = zip(*(trainer.micro_batches(config, client, round, step) for client in clients), strict=True)
            losses.append(together.step(list(micro), learning_rate(config, round, step)))
            for client, loss in zip(clients, losses[-1], strict=True):
                if client not in failed and (error := flaw_of_loss(loss, step, round)):
                    failed[client] = error
    return [math.fsum(each) / len(each) for each in zip(*losses, strict=True)], failed


class Together:
    """Several clients over a trainer's model. `frozen`, `trained`: each client's factors and heads (fp32, any device).
    `seeds`: of each client's dropout.

    A frozen factor that all clients share is held once; of all else each has its own along a first dimension, c long.
    """

    def __init__(
        self,
        trainer: LocalTrainer,
        config: FederationSection,
        trained: Sequence[Tensors],
        frozen: Sequence[Tensors],
        seeds: Sequence[int],
    ):
        self._trainer, self._config, self._count = trainer, config, len(trained)
        self._model, self._device, self._adapter = trainer.model, trainer.device, make_adapter(trainer.config.adapter)
        self._parameters = {
            name: nn.Parameter(torch.stack([client[name] for client in trained]).to(self._device))
            for name in trained[0]
        }
        self._frozen = {name: _stacked([client[name] for client in frozen]).to(self._device) for name in frozen[0]}
        self._held: dict[str, Tensor] = {**self._parameters, **self._frozen}
        self._optimizer = make_optimizer(self._parameters, config)
        Proximal(self._optimizer, config.proximal)
        self._dropouts = _Dropouts([torch.Generator(self._device).manual_seed(seed) for seed in seeds])

    def step(self, micro_batches: Sequence[Sequence[Sequence[Example]]], lr: float) -> list[float]:
        """One optimizer step; each client's mean loss. `micro_batches`: of each one the examples of every client, of
        all equally many. Raises ValueError for a model that draws dropout outside its modules."""
        set_rate(self._optimizer, lr)
        self._optimizer.zero_grad()
        totals = [0.0] * self._count
        for batches in micro_batches:
            losses = [loss / len(micro_batches) for loss in self._losses(batches)]
            torch.stack(losses).sum().backward()
            totals = [total + loss.item() for total, loss in zip(totals, losses, strict=True)]
        if self._config.max_grad_norm is not None:
            self._clip(self._config.max_grad_norm)
        self._optimizer.step()
        return totals

    def read(self) -> list[dict[str, Tensor]]:
        """Each client's trained factors and heads, as fp32 CPU tensors."""
        read = {name: parameter.detach().to("cpu", torch.float32) for name, parameter in self._parameters.items()}
        return [{name: tensor[i] for name, tensor in read.items()} for i in range(self._count)]

    def _losses(self, batches: Sequence[Sequence[Example]]) -> list[Tensor]:
        own = [self._trainer.batch(batch) for batch in batches]
        inputs = self._trainer.batch([example for batch in batches for example in batch])
        if self._trainer.config.model.loss_chunk is not None:
            inputs = with_targets(inputs)
        inputs.pop("labels")
        self._dropouts.lengths = [batch["input_ids"].shape[1] for batch in own]
        before = _random_state(self._device)
        logits = self._model(**inputs).logits
        if not torch.equal(before, _random_state(self._device)):
            raise ValueError(
                "this model draws dropout outside its modules (in its attention), and clients that train together "
                "need a stream each: set model.dropout to 0, or worker.batch_clients to 1"
            )
        parts = logits.chunk(self._count)
        return [self._trainer.task.loss(_given(part), batch) for part, batch in zip(parts, own, strict=True)]

    @torch.no_grad()
    def _clip(self, most: float) -> None:
        """Each client's gradient by its own norm, as `clip_grad_norm_` does."""
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
        scale = (most / (norms + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))

    # --- inside the model ---

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """While it lasts, the model's adapted layers, heads and dropouts work for these clients."""
        with contextlib.ExitStack() as stack:
            for name, layer in attach.adapted(self._model):
                stack.enter_context(_forward(layer, self._layer_forward(name, layer)))
            for name, head in attach.head_modules(self._model):
                stack.enter_context(_forward(head, self._head_forward(name, head)))
            for dropout in (m for m in self._model.modules() if isinstance(m, nn.Dropout) and m.p > 0):
                stack.enter_context(_forward(dropout, self._dropouts.forward(dropout.p)))
            yield

    def _layer_forward(self, name: str, layer: Any) -> Callable[..., Tensor]:
        shape = attach.shape_of(name, layer)
        factors = {factor: self._held[f"{name}.{factor}"] for factor in self._adapter.shapes(shape)}
        scale, dropout = layer.scaling[attach.ADAPTER], layer.lora_dropout[attach.ADAPTER]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = layer.base_layer(x, *args, **kwargs)
            x_ctn = dropout(x).to(torch.float32).reshape(self._count, -1, x.shape[-1])
            product = self._adapter.together(shape, factors, x_ctn) * scale
            return result + product.reshape(result.shape).to(result.dtype)

        return forward

    def _head_forward(self, name: str, head: nn.Module) -> Callable[..., Tensor]:
        """A head may be any module: it runs once for each client, with that client's parameters."""
        parts = {part: self._parameters[f"{name}.{part}"] for part, _ in head.named_parameters()}
        own = type(head).forward

        def forward(x: Tensor) -> Tensor:
            if self._dropouts.of_one:  # `functional_call` below comes here again
                return own(head, x)
            outputs = []
            for i, rows in enumerate(x.chunk(self._count)):
                with self._dropouts.only(i):
                    outputs.append(torch.func.functional_call(head, {part: p[i] for part, p in parts.items()}, (rows,)))
            return torch.cat(outputs)

        return forward


class _Dropouts:
    """Dropout of clients that stand one after the other in a batch, each from its own generator and of the shape that
    it would have alone: `lengths`, without the padding to the longest."""

    def __init__(self, generators: Sequence[torch.Generator]):
        self._generators = generators
        self._only: int | None = None
        self.lengths: Sequence[int] = ()

    @property
    def of_one(self) -> bool:
        """Whether what runs now is one client's."""
        return self._only is not None

    @contextlib.contextmanager
    def only(self, client: int) -> Iterator[None]:
        """What runs inside is one client's."""
        self._only = client
        try:
            yield
        finally:
            self._only = None

    def forward(self, p: float) -> Callable[[Tensor], Tensor]:
        """A dropout module's forward, in training."""

        def dropped(x: Tensor) -> Tensor:
            clients = range(len(self._generators)) if self._only is None else [self._only]
            masks = [self._mask(part, client, p) for part, client in zip(x.chunk(len(clients)), clients, strict=True)]
            return x * torch.cat(masks)

        return dropped

    def _mask(self, part: Tensor, client: int, p: float) -> Tensor:
        """0 or 1 / (1 - p); 0 on padding, where nothing is looked at."""
        length = self.lengths[client]
        if part.dim() == 2 or part.shape[1] == length:
            mask = torch.empty_like(part).bernoulli_(1 - p, generator=self._generators[client])
            return mask.div_(1 - p)
        own = torch.empty(part.shape[0], length, *part.shape[2:], dtype=part.dtype, device=part.device)
        own.bernoulli_(1 - p, generator=self._generators[client]).div_(1 - p)
        mask = torch.zeros_like(part)
        mask[:, :length] = own
        return mask


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor where all are the same one."""
    return tensors[0] if all(tensor is tensors[0] for tensor in tensors) else torch.stack(list(tensors))


def _given(logits: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    """What a task calls for logits or token losses, which are here already; without the padding to other clients'
    lengths."""

    def given(batch: dict[str, Tensor]) -> Tensor:
        by_class = logits.dim() == 2 and "targets" not in batch
        return logits if by_class else logits[:, : batch["input_ids"].shape[1]]

    return given


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextlib.contextmanager
def _forward(module: Any, forward: Callable[..., Tensor]) -> Iterator[None]:
    """The module with another forward."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
