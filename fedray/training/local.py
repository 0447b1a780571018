"""One client's local work: load what was broadcast, take the local steps, give back the update; and evaluation.

A `LocalTrainer` lives as long as its worker, loads the base weights once, and serves any client: everything about a
client comes with the call, so the same call gives the same bits on any worker.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fedray import seeding
from fedray.adapters import attach
from fedray.adapters.base import Adapter, Layer
from fedray.adapters.quantised import BaseUpdates, weight_of
from fedray.config.sections import Config, FederationSection
from fedray.data.encoded import Encoded, encode
from fedray.data.partition import FederatedData, load_data, public_data
from fedray.data.tasks import TASKS, Example, Task
from fedray.methods import View
from fedray.methods.state import factor_of
from fedray.privacy.private import Private
from fedray.ranks import ALONE, Ranks
from fedray.training.engine import StepEngine, make_engine
from fedray.training.generation import Evaluated
from fedray.training.memory import OutOfMemory, out_of_memory, out_of_memory_on
from fedray.training.model import load_model, load_tokenizer
from fedray.training.sampling import sample

if TYPE_CHECKING:
    from fedray.privacy.dpsgd import SampleHooks


@dataclass
class LocalResult:
    """What local training gives: the trained tensors (fp32, CPU), the number of examples held, the mean loss (None
    where it is private). `shortened`: rows that `data.max_length` cut, or left nothing of."""

    tensors: dict[str, Tensor]
    examples: int
    loss: float | None
    optimizer_state: dict[str, Tensor] = field(default_factory=dict)
    base_lost: float = 0.0
    """Frobenius norm of the part of the base update that the weights' dtype could not hold."""
    seconds: float = 0.0
    shortened: int = 0


def learning_rate(config: FederationSection, round: int, step: int) -> float:
    """The rate at a local step (both from 0): linear warm-up, then constant, linear or cosine to 0."""
    over_run = config.schedule_over == "run"
    total = config.local_steps * (config.rounds if over_run else 1)
    position = step + (round * config.local_steps if over_run else 0)
    warm = math.ceil(config.warmup * total)
    if position < warm:
        return config.lr * (position + 1) / warm
    left = (total - position) / max(1, total - warm)
    return config.lr * {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[config.schedule]


def _picked(private: Private, step: int, examples: int) -> list[int]:
    """The Poisson sample of a private step."""
    return private.stream("sample", step).sample(examples, private.rate)


def flaw_of_loss(loss: float, step: int, round: int) -> FloatingPointError | None:
    """The error of a loss at a local step of a round (both from 0) that is no number."""
    if math.isfinite(loss):
        return None
    return FloatingPointError(
        f"the loss became {loss} at local step {step + 1} of round {round + 1}: lower federation.lr"
    )


class LocalTrainer:
    """Trains and evaluates on one device. `threads`: PyTorch's CPU threads, part of what fixes the bits. `reads`: as
    `load_data` takes it. `ranks`: with whom it takes its clients' steps; all of them do the same calls of `train`,
    `evaluate` and `reset`."""

    def __init__(
        self,
        config: Config,
        device: str,
        threads: int,
        data: FederatedData | None = None,
        reads: Sequence[str] = (),
        ranks: Ranks = ALONE,
    ):
        torch.set_num_threads(threads)
        self.config, self.device, self.ranks = config, torch.device(device), ranks
        self.data = data if data is not None else load_data(config, reads)
        self.task: Task = TASKS[config.model.task](config, self.data, load_tokenizer(config))
        self.model = load_model(config, len(self.data.classes)).to(self.device)
        self.factors, self._heads = attach.factors(self.model), attach.heads(self.model)
        self._initial_heads = {n: p.detach().float().cpu().clone() for n, p in self._heads.items()}
        self.layers = attach.layers(self.model)
        self._engine: StepEngine | None = None
        self._mode: bool | None = None  # of all modules: a model comes with some in the one and some in the other
        self._hooks: SampleHooks | None = None
        self._engine_for: tuple[str, ...] = ()
        self._base = (
            attach.BaseWeights(self.model, self._gathered)
            if config.model.quantise is None
            else BaseUpdates(attach.base_layers(self.model), config.model.base_rank)
        )
        self._base_key: Any = None
        self._base_lost = 0.0
        self._encoded: dict[tuple[str, str], Encoded] = {}

    @property
    def was_loaded(self) -> bool:
        """Whether the model may hold other weights than it was made with."""
        return self._engine is not None

    def describe(self) -> tuple[tuple[Layer, ...], dict[str, Tensor]]:
        """What the coordinator must know of the model: the adapted layers, and the heads' initial values (fp32,
        CPU)."""
        return self.layers, self._initial_heads

    def start_from_weights(self, adapter: Adapter) -> dict[str, Tensor]:
        """The adapter's started factors from the base weights (fp32, CPU). Called before any base update is written."""
        bases = attach.base_layers(self.model)
        started: dict[str, Tensor] = {}
        for layer in self.layers:
            module = bases[layer.name]
            weight = weight_of(module)
            weight = weight.T if weight.shape != (layer.m, layer.n) or getattr(module, "nf", None) else weight
            started |= {f"{layer.name}.{f}": t for f, t in adapter.start(layer, weight, self.config.seed).items()}
        return started

    def gradient_examples(self, client: str | None, count: int) -> list[Example]:
        """The first `count` of a client's examples in an order drawn by the seed; `client=None`: of the public data
        set."""
        if client is not None:
            examples = self.examples("train", client)
        else:
            if ("public", "") not in self._encoded:
                self._encoded["public", ""] = encode(
                    self.task, public_data(self.config, self.data), self.config.worker.cache
                )
            examples = self._encoded["public", ""]
        order = torch.randperm(
            len(examples), generator=seeding.generator(self.config.seed, "subspace", client or "public")
        )
        return [examples[i] for i in order[:count].tolist()]

    def examples(self, part: str, client: str = "") -> Encoded:
        """Encoded examples of `train` or `held-out` (a client's) or `test` (the coordinator's); encoded once a
        worker."""
        if (part, client) not in self._encoded:
            held = {"train": self.data.train, "held-out": self.data.held_out, "test": {client: self.data.test}}[part]
            if client not in held:
                raise ValueError(f"the {part} data of client '{client}' are not read on this node")
            dataset = held[client]
            encoded = encode(self.task, dataset, self.config.worker.cache, held_out=part != "train")
            if not encoded:
                raise ValueError(
                    f"{f'client {client!r}: ' if client and part != 'train' else ''}its {part} data holds no "
                    "text of at least two tokens"
                )
            if part != "train":  # similar lengths together: less padding, and a fixed order
                encoded = encoded.by_length()
            self._encoded[part, client] = encoded
        return self._encoded[part, client]

    def train(
        self,
        view: View,
        client: str,
        round: int,
        optimizer_state: dict[str, Tensor] | None = None,
        base_key: Any = None,
        private: Private | None = None,
    ) -> LocalResult:
        """Take the client's local steps of a round (from 0) from what was broadcast; with DP-SGD where they are
        private."""
        started = time.monotonic()
        config = self.config.client(client)
        examples = self.examples("train", client)
        engine = self._load(view, config, optimizer_state, base_key)
        self.set_mode(training=True)
        self._seed_dropout(seeding.derive(self.config.seed, "dropout", client, round, *self._own_stream))
        kept_of = engine.optimizer_state if config.keep_optimizer else dict
        if private is not None:
            self._private_steps(engine, config, examples, round, private)
            return LocalResult(
                engine.read(), len(examples), None, kept_of(), self._base_lost, time.monotonic() - started
            )
        with self._profiled(client, round):
            try:
                losses = self._steps(engine, config, client, round)
            except torch.OutOfMemoryError:
                losses = []
        if not losses:  # outside of the handler, whose traceback holds the step's tensors
            raise self._out_of_memory(view, config, client)
        loss = math.fsum(losses) / len(losses)
        seconds, shortened = time.monotonic() - started, self.shortened(client)
        return LocalResult(engine.read(), len(examples), loss, kept_of(), self._base_lost, seconds, shortened)

    def shortened(self, client: str) -> int:
        """How many of a client's rows do not train whole: `data.max_length` cut them, or left nothing of them."""
        examples, rows = self.examples("train", client), len(self.data.train[client])
        return examples.cut + (0 if self.task.cuts(self.config.data) else rows - len(examples))

    @property
    def _own_stream(self) -> tuple[int, ...]:
        """What tells this rank's random numbers from the first's."""
        return (self.ranks.rank,) if self.ranks.rank else ()

    def _out_of_memory(self, view: View, config: FederationSection, client: str) -> OutOfMemory:
        if self.ranks.world > 1:  # to try what would fit takes all of them, and they stand in the middle of a step
            return out_of_memory_on(self.ranks, self.device, config)
        return out_of_memory(self, self._rebuild(self.trained(view)), config, client)

    def untrained(self, view: View, client: str) -> LocalResult:
        """As `train` without a step: what was broadcast."""
        trained = self.trained(view)
        return LocalResult({n: view.tensors[n].clone() for n in trained}, len(self.examples("train", client)), None)

    def trained(self, view: View) -> dict[str, nn.Parameter]:
        """The factors that train, and the heads."""
        return {n: p for n, p in self.factors.items() if factor_of(n) in view.trained} | self._heads

    def set_mode(self, training: bool) -> None:
        """Walks over all modules only where it changes something: it costs as much as a small model's step."""
        if self._mode is not training or self.model.training is not training:
            self.model.train(training)
            self._mode = training

    def _seed_dropout(self, seed: int) -> None:
        """As `torch.manual_seed`, which where there is no GPU keeps a stack trace of every call, and never lets go."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def micro_batches(self, config: FederationSection, client: str, round: int, step: int) -> list[list[Example]]:
        """The examples of a client's local step, as they are in memory at once."""
        examples = self.examples("train", client)
        lengths = examples.lengths if self.config.data.group_by_length else None
        step += round * config.local_steps
        picked = sample(len(examples), config.batch_size, step, self.config.seed, "data", client, lengths=lengths)
        size = config.micro_batch
        if config.accumulate > 1:  # micro-batches of similar lengths: less padding, the same examples in the batch
            picked.sort(key=lambda i: len(examples[i].input_ids))
        return [[examples[i] for i in picked[j : j + size]] for j in range(0, len(picked), size)]

    def _steps(self, engine: StepEngine, config: FederationSection, client: str, round: int) -> list[float]:
        losses, ranks, loss = [], self.ranks, self.ranks.weighed(self.task.loss)
        for step in range(config.local_steps):
            batches = [self.batch(part) for part in self.micro_batches(config, client, round, step)]
            micro = [ranks.part_of_mean(batch, self.task.counted) for batch in batches]
            losses.append(ranks.mean(engine.step(micro, loss, learning_rate(config, round, step))))
            if error := flaw_of_loss(losses[-1], step, round):
                raise error
        return losses

    @contextlib.contextmanager
    def _profiled(self, client: str, round: int) -> Iterator[None]:
        """Write a trace of what happens inside, where `worker.profile` names this client and round."""
        if self.config.worker.profile != f"{client}:{round + 1}" or self.ranks.rank:
            yield
            return
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=kinds, record_shapes=True, profile_memory=True) as profiler:
            yield
        folder = Path(self.config.output.dir or ".") / "profile"
        file = folder / f"{urllib.parse.quote(client, safe=' ')}-round-{round + 1}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(file))
        except OSError as error:
            # A worker's machine may not have the run directory; that is no reason to lose the round.
            logging.getLogger("fedray").warning(
                "the trace of worker.profile could not be written to %s: %s", folder, error
            )

    def _private_steps(
        self, engine: StepEngine, config: FederationSection, examples: Sequence[Example], round: int, private: Private
    ) -> None:
        from fedray.privacy.dpsgd import private_step

        if self._hooks is None:
            raise ValueError("the config is not of a run with example-level privacy: nothing was hooked for its steps")
        ranks, losses = self.ranks, self.ranks.weighed(self.task.losses)
        size = config.micro_batch * ranks.world  # on each rank, the most samples whose gradients are in memory at once
        for step in range(config.local_steps):
            picked = ranks.from_first(partial(_picked, private, step, len(examples)))
            if private.watch is not None:
                private.watch.sampled(len(picked), len(examples))
            picked.sort(
                key=lambda i: (len(examples[i].input_ids), i)
            )  # less padding; each sample's gradient is its own
            batches = [self.batch([examples[i] for i in picked[j : j + size]]) for j in range(0, len(picked), size)]
            private_step(
                engine,
                self._hooks,
                [ranks.part_of_sum(batch) for batch in batches],
                losses,
                learning_rate(config, round, step),
                private.mechanism,
                private.stream("noise", step) if ranks.rank == 0 else None,
                check=step == 0,
                first=round == 0 and step == 0,
                watch=private.watch,
                ranks=ranks,
            )

    def clipped_sum(self, examples: list[Example], clip: float) -> Tensor:
        """What a private step over these examples would sum before its noise, as one fp64 vector: an audit's question
        about the model of the last round."""
        from fedray.privacy.dpsgd import clipped_sum

        if self._hooks is None or self._engine is None:
            raise ValueError("no private step was taken: there is no sum to look at")
        self.set_mode(training=True)
        batches = [self.batch(examples)] if examples else []
        total = clipped_sum(self._engine, self._hooks, batches, self.task.losses, clip).total()
        self.reset()
        return total

    @torch.no_grad()
    def evaluate(
        self, view: View, part: str, client: str, share: tuple[int, int], base_key: Any = None
    ) -> list[list[dict]]:
        """Statistics of every `share[1]`-th batch from `share[0]` on, in order; batches do not depend on the share. Of
        several ranks each has every `world`-th of them."""
        engine = self._load(view, self.config.federation, None, base_key)
        self.set_mode(training=False)
        examples, size = self.examples(part, client), 4 * self.config.federation.batch_size
        model = Evaluated(engine, self.task, self.config.generation, self.device)
        starts, own = self.ranks.dealt(range(0, len(examples), size)[share[0] :: share[1]])
        result = []
        for start in starts:
            rows = examples[start : start + size]
            self._seed_dropout(seeding.derive(self.config.seed, "generation", part, client, start))
            result.append(self.task.statistics(model, rows, self.batch(rows)))
        return result[:own]

    def reset(self) -> None:
        """After an error: forget the engine, which may stand in the middle of a step."""
        self._engine_for, self._base_key = (), None

    def logits(self, view: View, inputs: dict[str, Tensor]) -> Tensor:
        """Logits of the model that a view means: what exported adapters are held against."""
        engine = self._load(view, self.config.federation, None, None)
        self.set_mode(training=False)
        with torch.no_grad():
            return engine.forward({k: v.to(self.device) for k, v in inputs.items()}).float().cpu()

    @property
    def base_lost(self) -> float:
        """What the weights' dtype could not hold of the base update written last."""
        return self._base_lost

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """As the task collates them, on the device."""
        return {name: tensor.to(self.device) for name, tensor in self.task.collate(examples).items()}

    def _load(
        self,
        view: View,
        config: FederationSection,
        optimizer_state: dict[str, Tensor] | None,
        base_key: Any,
    ) -> StepEngine:
        """Make the model what the view says. The engine is rebuilt only when other parameters train."""
        trained = self.trained(view)
        engine = self._engine if self._engine_for == tuple(trained) else None
        engine = engine or self._rebuild(trained)
        self._write({n: p for n, p in self.factors.items() if n not in trained}, view, engine)
        engine.load(view.tensors, optimizer_state)
        self.load_base(view, base_key)
        return engine

    def load_base(self, view: View, base_key: Any) -> None:
        """The base weights that a view means, unless they are there."""
        if base_key is None or base_key != self._base_key:
            self._base_key = None  # until it is written: what fails half-way is nobody's base
            self._base_lost = self._base.write(view.base)
            self._base_key = base_key

    @staticmethod
    def _write(frozen: dict[str, nn.Parameter], view: View, engine: StepEngine) -> None:
        """Give the factors that rest their values."""
        if frozen:
            with engine.gathered(list(frozen.values())), torch.no_grad():
                for name, parameter in frozen.items():
                    parameter.copy_(view.tensors[name])

    def _rebuild(self, trained: dict[str, nn.Parameter]) -> StepEngine:
        """An engine over these parameters, with new hooks where its steps are private."""
        if self._engine is not None:
            self._engine.close()
        for name, parameter in self.factors.items():
            parameter.requires_grad_(name in trained)
        private = self.config.privacy.on and self.config.privacy.unit == "example"
        self._engine = make_engine(self.model, trained, self.config.federation, self.config.worker, private)
        if private:
            from fedray.privacy.dpsgd import SampleHooks  # opacus takes seconds, which other runs do not pay

            if self._hooks is not None:
                self._hooks.close()
            self._hooks = SampleHooks(self.model)
        self._engine_for = tuple(trained)
        return self._engine

    def _gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which the parameters are whole and may be written."""
        if self._engine is None:
            return contextlib.nullcontext()  # nobody has partitioned them yet
        return self._engine.gathered(parameters)
