"""A worker: trains and evaluates whichever client it is asked to. Plain Python; `pool_ray.py` makes it an actor."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fedray.adapters import ADAPTERS, Layer
from fedray.config import Config, make_method
from fedray.data.partition import FederatedData
from fedray.federation.messages import Failure, Report
from fedray.federation.wire import Header, Packet, decode, pack, unpack
from fedray.methods import Spec, View
from fedray.training.local import LocalTrainer


class Worker:
    """Holds the model for its whole life and the increments it has seen; nothing about any client."""

    def __init__(self, config: Config, device: str, threads: int, data: FederatedData | None = None):
        self.trainer = LocalTrainer(config, device, threads, data)
        self.method = make_method(config)
        self.spec = Spec(ADAPTERS[config.adapter.kind], self.trainer.layers, config.seed)
        self._increments: dict[tuple[int, str], dict[str, Tensor]] = {}  # by version and digest

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        """The adapted layers and the heads' initial values."""
        return self.trainer.describe()

    def train(
        self, client: str, round: int, header: Header, packet: Packet, fetch: Callable[[int], Packet], optimizer: Packet | None
    ) -> tuple[Packet | None, Packet | None, Report | Failure]:
        """(update, optimizer state, report) of a client's round (from 0), or its failure. Never raises for the client's sake."""
        try:
            view, base_key = self._view(client, header, packet, fetch)
            state = unpack(optimizer) if optimizer is not None else None
            result = self.trainer.train(view, client, round, state, base_key)
        except Exception as error:  # whatever a client's data or step raises is that client's failure, and is reported as such
            self.trainer.reset()
            return None, None, Failure(client, _cause(error), traceback.format_exc())
        kept = pack(result.optimizer_state) if self.trainer.config.federation.keep_optimizer else None
        return pack(result.tensors), kept, Report(client, result.examples, result.loss, result.base_lost, result.seconds)

    def evaluate(
        self, part: str, client: str | None, share: tuple[int, int], header: Header, packet: Packet, fetch: Callable[[int], Packet]
    ) -> tuple[list[list[dict[str, Any]]], float]:
        """Statistics by batch, and what the base's dtype lost."""
        view, base_key = self._view(client, header, packet, fetch)
        statistics = self.trainer.evaluate(view, part, client or "", share, base_key)
        return statistics, self.trainer.base_lost

    def _view(self, client: str | None, header: Header, packet: Packet, fetch: Callable[[int], Packet]) -> tuple[View, Any]:
        live = {(version, digest) for version, _, digest in header.increments}
        self._increments = {k: t for k, t in self._increments.items() if k in live}
        for version, digest in sorted(live - self._increments.keys()):
            self._increments[version, digest] = unpack(fetch(version))
        increments = {version: t for (version, _), t in self._increments.items()}
        view = self.method.view(self.spec, decode(header, packet, increments), client)
        return view, None if self.method.personal else header.base_key


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, (FloatingPointError, ValueError)) and text else f"{type(error).__name__}: {text}"

