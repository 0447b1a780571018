"""One optimizer step, in two forms that give the same numbers: DeepSpeed (the product) and plain PyTorch (its oracle).

Both keep warm from round to round: `load` writes factors and a fresh (or a client's own) optimizer state into them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedray.adapters.modules import whole_shape
from fedray.config.sections import FederationSection, WorkerSection

Parameters = dict[str, nn.Parameter]
Loss = Callable[[Callable, dict], Tensor]


class StepEngine(Protocol):
    """What local training needs. `parameters`: the trained ones, by name, in the order the optimizer holds them."""

    model: nn.Module
    parameters: Parameters

    def load(self, values: dict[str, Tensor], optimizer_state: dict[str, Tensor] | None) -> None:
        """Overwrite the named trained parameters, and start the optimizer afresh or from a saved state."""

    def step(self, micro_batches: Sequence[dict], loss: Loss, lr: float) -> float:
        """One optimizer step over the micro-batches; returns their mean loss."""

    def backward(self, value: Tensor, last: bool) -> None:
        """Gradients of one of a step's micro-batches; `last`: no other follows."""

    def apply(self, gradients: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
        """One optimizer step along these gradients (fp32, by name) and no others; returns those that the optimizer
        held."""

    def read(self) -> dict[str, Tensor]:
        """The trained parameters as fp32 CPU tensors."""

    def optimizer_state(self) -> dict[str, Tensor]:
        """`NAME/exp_avg` and the like and `step`, as fp32 CPU tensors."""

    def forward(self, inputs: dict) -> Tensor:
        """Logits of a batch; a `labels` entry is not passed on."""

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        """As transformers' `generate`: prompts and what follows them, batch x length."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """A context in which the parameters are whole (ZeRO-3 partitions them) and may be written."""

    def close(self) -> None:
        """Let go of the model."""


def make_optimizer(parameters: Parameters, config: FederationSection) -> torch.optim.Optimizer:
    """The local optimizer over the trained parameters, in order of name."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters.values(), lr=config.lr, weight_decay=config.weight_decay)


def set_rate(optimizer: Any, lr: float) -> None:
    """The learning rate of the next step, of a torch optimizer or what DeepSpeed wraps it in."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Proximal:
    """FedProx (Li et al., MLSys 2020, arXiv 1812.06127): mu (w - w_broadcast) joins each gradient just before the
    optimizer's step, so also on the flat partitions that ZeRO steps on; the clipping of the loss's own gradient does
    not see it."""

    def __init__(self, optimizer: torch.optim.Optimizer, mu: float):
        self._mu = mu
        self._start: dict[tuple[int, int], Tensor] = {}
        if mu > 0:
            optimizer.register_step_pre_hook(self._add)

    def restart(self) -> None:
        """What the optimizer holds at its next step is the new w_broadcast."""
        self._start.clear()

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        for i, group in enumerate(optimizer.param_groups):
            for j, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    start = self._start.setdefault((i, j), parameter.detach().clone())
                    parameter.grad.add_(parameter - start, alpha=self._mu)


class TorchEngine:
    """Plain PyTorch."""

    def __init__(self, model: nn.Module, parameters: Parameters, config: FederationSection):
        self.model, self.parameters, self.config = model, parameters, config
        self._generate: Any = getattr(model, "generate", None)  # a classifier has none
        self.optimizer = make_optimizer(parameters, config)
        self._proximal = Proximal(self.optimizer, config.proximal)

    @torch.no_grad()
    def load(self, values: dict[str, Tensor], optimizer_state: dict[str, Tensor] | None) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])
        self._proximal.restart()
        self.optimizer.state.clear()
        if optimizer_state:
            for name, parameter in self.parameters.items():
                saved = {k.removeprefix(f"{name}/"): v for k, v in optimizer_state.items() if k.startswith(f"{name}/")}
                self.optimizer.state[parameter] = {k: v.to(parameter.device, copy=True) for k, v in saved.items()}
                self.optimizer.state[parameter]["step"] = optimizer_state["step"].reshape(()).clone()

    def step(self, micro_batches: Sequence[dict], loss: Loss, lr: float) -> float:
        total = 0.0
        set_rate(self.optimizer, lr)
        self.optimizer.zero_grad()
        for batch in micro_batches:
            value = loss(self.forward, batch)
            (value / len(micro_batches)).backward()
            total += value.item() / len(micro_batches)
        if self.config.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
        self.optimizer.step()
        return total

    def backward(self, value: Tensor, last: bool) -> None:
        value.backward()

    def apply(self, gradients: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
        set_rate(self.optimizer, lr)
        held = {}
        for name, parameter in self.parameters.items():
            parameter.grad = gradients[name].clone()
            held[name] = parameter.grad.clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return held

    def read(self) -> dict[str, Tensor]:
        return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        saved = {}
        for name, parameter in self.parameters.items():
            for k, v in self.optimizer.state[parameter].items():
                if k == "step":
                    saved["step"] = v.reshape(1).float().cpu().clone()
                elif torch.is_tensor(v):
                    saved[f"{name}/{k}"] = v.detach().float().cpu().clone()
        return saved

    def forward(self, inputs: dict) -> Tensor:
        return self.model(**{k: v for k, v in inputs.items() if k != "labels"}).logits

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        said: Tensor = self._generate(**inputs, **options)
        return said

    def close(self) -> None:
        self.optimizer.zero_grad()

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        return contextlib.nullcontext()


#: DeepSpeed's words for `worker.offload`.
_OFFLOADS: dict[str, dict[str, Any]] = {
    "none": {},
    "optimizer": {"offload_optimizer": {"device": "cpu"}},
    "all": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


class DeepSpeedEngine:
    """DeepSpeed, ZeRO 0 to 3, of one rank or of the process group that there is, with no compiler on CPU, and of one
    rank no port (see `_deepspeed`).

    DeepSpeed's own 16-bit modes stay off: the base may be bf16, the adapters are fp32, so the value on the wire, the
    parameter and the optimizer's master are one number.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        config: FederationSection,
        zero_stage: int,
        offload: str = "none",
    ):
        self.model, self.parameters, self.config, self.stage = model, parameters, config, zero_stage
        deepspeed = _deepspeed(next(model.parameters()).device)
        numbers = sum(math.prod(whole_shape(parameter)) for parameter in parameters.values())
        self.engine, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(parameters, config),
            config={
                "train_micro_batch_size_per_gpu": 1,  # nominal: DeepSpeed only multiplies it out
                "gradient_accumulation_steps": config.accumulate,
                "gradient_clipping": config.max_grad_norm or 0.0,
                # Its own bucket is 2 GB, made with every engine, whatever trains.
                "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": numbers, **_OFFLOADS[offload]},
                "zero_allow_untested_optimizer": True,
                "zero_force_ds_cpu_optimizer": False,  # its own for offloaded states is built with a C++ compiler
                "steps_per_print": sys.maxsize,
            },
        )
        self._zero = deepspeed.zero
        self._fragments = sys.modules["deepspeed.utils"]
        optimizer = self.engine.optimizer
        self._torch_optimizer = getattr(optimizer, "optimizer", optimizer)
        self._proximal = Proximal(self._torch_optimizer, config.proximal)
        self._has_gradients = False
        if config.keep_optimizer and zero_stage > 0:
            self._materialise()

    def _materialise(self) -> None:
        """ZeRO makes its momenta at the first step: take one with gradient and rate 0, so that they can be restored."""
        with torch.enable_grad():  # the engine may be built for an evaluation
            self.step([self._dummy] * self.config.accumulate, lambda forward, batch: 0.0 * forward(batch).sum(), 0.0)

    @property
    def _dummy(self) -> dict[str, Tensor]:
        return {"input_ids": torch.ones(1, 2, dtype=torch.long, device=next(self.model.parameters()).device)}

    def gathered(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        whole: AbstractContextManager[None] = self._zero.GatheredParameters(
            list(parameters), modifier_rank=0, enabled=self.stage == 3
        )
        return whole

    def load(self, values: dict[str, Tensor], optimizer_state: dict[str, Tensor] | None) -> None:
        with self.gathered(list(self.parameters.values())), torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])
        if self.stage > 0:
            # Both writes are needed: without the master the next step would bring the old values back.
            for name, parameter in self.parameters.items():
                self._set("fp32_param", parameter, values[name].to(parameter.device))
        self._proximal.restart()
        for value in (v for state in self._torch_optimizer.state.values() for v in state.values()):
            if torch.is_tensor(value):
                value.zero_()
        if optimizer_state:
            self._restore(optimizer_state)

    def _set(self, what: str, parameter: Any, value: Tensor, *key: str) -> None:
        """DeepSpeed's `safe_set_full_...`, which in ZeRO-3 cannot cut a value whose numbers the ranks do not divide:
        there each rank sets its own part, the last filled up with zeros."""
        if self.stage < 3:
            getattr(self._fragments, f"safe_set_full_{what}")(parameter, value, *key)
            return
        flat, size = value.flatten(), parameter.ds_tensor.numel()
        rank = torch.distributed.get_rank()
        part = flat[rank * size : (rank + 1) * size]
        part = nn.functional.pad(part, (0, size - len(part)))
        getattr(self._fragments, f"safe_set_local_{what}")(parameter, part, *key)

    def _restore(self, saved: dict[str, Tensor]) -> None:
        kinds = sorted({k.rsplit("/", 1)[1] for k in saved if "/" in k})
        if self.stage > 0:
            self._restore_partitions(saved, kinds)
            return
        for name, parameter in self.parameters.items():
            state = {k: saved[f"{name}/{k}"].to(parameter.device, copy=True) for k in kinds}
            self._torch_optimizer.state[parameter] = state | {"step": saved["step"].reshape(()).clone()}

    def _restore_partitions(self, saved: dict[str, Tensor], kinds: list[str]) -> None:
        for state in self._torch_optimizer.state.values():
            if "step" in state:
                state["step"].fill_(saved["step"].item())
        for name, parameter in self.parameters.items():
            for k in kinds:
                self._set("optimizer_state", parameter, saved[f"{name}/{k}"].to(parameter.device), k)

    def step(self, micro_batches: Sequence[dict], loss: Loss, lr: float) -> float:
        total = 0.0
        set_rate(self.engine.optimizer, lr)
        for batch in micro_batches:
            value = loss(self.forward, batch)
            self.engine.backward(value)
            self.engine.step()
            total += value.item() / len(micro_batches)
        return total

    def backward(self, value: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(value)
        self._has_gradients = True

    def apply(self, gradients: dict[str, Tensor], lr: float) -> dict[str, Tensor]:
        set_rate(self.engine.optimizer, lr)
        if not self._has_gradients:  # ZeRO takes gradients only in the place of others
            self.backward(0.0 * self.forward(self._dummy).sum(), True)
        for name, parameter in self.parameters.items():
            self._set("grad", parameter, gradients[name])
        held = {
            name: self._fragments.safe_get_full_grad(parameter).clone() for name, parameter in self.parameters.items()
        }
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        self._has_gradients = False
        return held

    def read(self) -> dict[str, Tensor]:
        if self.stage == 0:
            return {n: p.detach().to("cpu", torch.float32, copy=True) for n, p in self.parameters.items()}
        get = self._fragments.safe_get_full_fp32_param
        return {n: get(p).detach().to("cpu", torch.float32, copy=True) for n, p in self.parameters.items()}

    def optimizer_state(self) -> dict[str, Tensor]:
        saved: dict[str, Tensor] = {}
        first: dict[str, Tensor] = next(iter(self._torch_optimizer.state.values()), {})
        if "step" in first:
            saved["step"] = first["step"].reshape(1).float().cpu().clone()
        for name, parameter in self.parameters.items():
            for k in (k for k, v in first.items() if torch.is_tensor(v) and k != "step"):
                if self.stage == 0:
                    value = self._torch_optimizer.state[parameter][k]
                else:
                    value = self._fragments.safe_get_full_optimizer_state(parameter, k)
                saved[f"{name}/{k}"] = value.detach().reshape(whole_shape(parameter)).float().cpu().clone()
        return saved

    def forward(self, inputs: dict) -> Tensor:
        return self.engine(**{k: v for k, v in inputs.items() if k != "labels"}).logits

    def generate(self, inputs: dict[str, Tensor], **options: Any) -> Tensor:
        # Ranks that share the parameters go on until the last of them has ended.
        together = self.stage == 3 and torch.distributed.get_world_size() > 1
        said: Tensor = self.engine.module.generate(**inputs, **options, synced_gpus=together)
        return said

    def close(self) -> None:
        """What `destroy` leaves at the model would go into the next engine's steps: the gradients of a step that
        failed, and hooks that hold this engine with its moments. DeepSpeed destroys once more when it is collected,
        whenever that is, and would take the parameters from the engine that has them by then."""
        self.engine.destroy()
        self.engine.destroy = _nothing
        self.engine.module_forward_pre_hook.remove()
        self.engine.module_forward_post_hook.remove()
        for parameter in self.model.parameters():
            parameter.grad = None


def _nothing() -> None:
    """In the place of what has been done."""


def _deepspeed(device: torch.device) -> ModuleType:
    """DeepSpeed, imported quietly, with the process group that there is, or one of one rank that needs no port, and, on
    CPU, no compiler."""
    os.environ["LOCAL_RANK"] = "0"  # asserted by the engine; every process has one device
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed

    if device.type == "cpu":
        # Built with a C++ compiler otherwise (23 s, or an error where there is none). `import deepspeed.comm.torch`
        # gives torch itself, hence sys.modules.
        vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "gloo" if device.type == "cpu" else "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
    return deepspeed


def make_engine(
    model: nn.Module,
    parameters: Parameters,
    federation: FederationSection,
    worker: WorkerSection,
    private: bool = False,
) -> StepEngine:
    """The engine that `worker.backend` and `worker.zero_stage` ask for. `private`: clipping and micro-batches are
    `private_step`'s."""
    if private:
        federation = federation.model_copy(update={"accumulate": 1, "max_grad_norm": None})
    if worker.backend == "torch":
        return TorchEngine(model, parameters, federation)
    return DeepSpeedEngine(model, parameters, federation, worker.zero_stage, worker.offload)
