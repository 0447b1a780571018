"""How many workers run, and on what: decided from the config and what the cluster has, and said in one sentence."""

from __future__ import annotations

from dataclasses import dataclass

from fedray.config import Config
from fedray.errors import ConfigError


@dataclass(frozen=True)
class Placement:
    """`workers` actors of `gpus` GPUs and `cpus` CPUs (threads) each; `reason` is for the person."""

    workers: int
    gpus: float
    cpus: int
    reason: str

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


def place(config: Config, clients: int, cpus: float, gpus: float) -> Placement:
    """The workers for that many clients on a cluster of that many CPUs and GPUs.

    Raises ConfigError, with the arithmetic, for an ask that can never be placed.
    """
    asked = config.worker
    each = asked.gpus if asked.gpus is not None else (1.0 if gpus else 0.0)
    if config.engine == "inline":
        if each > gpus:
            raise ConfigError(f"worker.gpus {each:g} is more than the {gpus:g} GPUs there are: lower it")
        threads = asked.cpus or max(1, int(cpus))
        where = "the GPU" if each else f"{threads} CPU threads"
        return Placement(1, each, threads, f"inline: {clients} clients in turn, one process, {where}")
    cohort = min(config.federation.cohort or clients, clients)
    # One worker a client of the cohort while they fit; a client beyond that waits for its turn.
    room = int(gpus / each) if each else int(cpus / (asked.cpus or 1))
    count = asked.count or max(1, min(cohort, room))
    share = asked.cpus or max(1, int(cpus / count))
    if each and count * each > gpus:
        raise ConfigError(f"{count} workers x {each:g} GPUs = {count * each:g} GPUs, but there are {gpus:g}: lower worker.count or worker.gpus")
    if count * share > cpus:
        raise ConfigError(f"{count} workers x {share} CPUs = {count * share} CPUs, but there are {cpus:g}: lower worker.count or worker.cpus")
    resources = f"{each:g} GPU{'s' if each > 1 else ''} and {share} CPU{'s' if share > 1 else ''}" if each else f"{share} CPU{'s' if share > 1 else ''} (no GPU here)" if not gpus else f"{share} CPUs"
    turns = "each client has its own" if count >= clients else f"serving {clients} clients in turn"
    return Placement(count, each, share, f"{count} worker{'s' if count > 1 else ''} of {resources}, {turns}")
