"""What does not go together across sections. Each check raises ValueError with one sentence that names the fix."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path

from fedray.config.build import make_adapter, make_method
from fedray.config.sections import BUILTIN, Config
from fedray.data.tasks import TASKS, check_task
from fedray.federation.channels.registry import check as check_privacy
from fedray.methods import Method

FILES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")


def check(config: Config) -> None:
    """Raises ValueError for the first thing that does not go together."""
    make_adapter(config.adapter)
    method = make_method(config)
    for one in CHECKS:
        one(config, method)


def _refuse(what: str, reasons: Mapping[str, bool], fix: str) -> None:
    """Raises ValueError with the first of the reasons that holds, if one does."""
    for reason in (words for words, holds in reasons.items() if holds):
        raise ValueError(f"{what} cannot be: {reason}; {fix}")


def _batches(config: Config, method: Method) -> None:
    accumulate = config.federation.accumulate
    batches = {"federation": config.federation.batch_size} | {
        f"clients.{name}": client.batch_size for name, client in config.clients.items() if client.batch_size
    }
    for where, batch in batches.items():
        if batch % accumulate:
            raise ValueError(
                f"federation.accumulate {accumulate} does not divide {where}.batch_size {batch}: choose a divisor"
            )


def _rounds(config: Config, method: Method) -> None:
    if config.federation.keep_optimizer and method.alternates:
        raise ValueError(
            f"federation.keep_optimizer does not fit {method.name}: "
            "each round trains the factor that the last one did not; leave it out"
        )
    if config.federation.deadline is not None and config.engine == "inline":
        raise ValueError("federation.deadline needs engine ray: inline clients run one after the other")


def _best(config: Config, method: Method) -> None:
    """What a choice was made by is no measure of it."""
    given = [name for name in ("patience", "best_round") if getattr(config.federation, name)]
    if given and config.data.evaluate_on != "validation":
        raise ValueError(
            f"federation.{given[0]} chooses a round by its metrics, and those of the test split would then flatter it: "
            "give data.evaluate_on validation"
        )


def _robust(config: Config, method: Method) -> None:
    """A rule that is no mean cannot be taken of a sum, nor noised as one."""
    if method.robust is None or method.robust.linear:
        return
    rule = f"method.robust_rule {method.robust.name}"
    if config.privacy.secure_aggregation:
        raise ValueError(
            f"{rule} holds single updates against each other, and privacy.secure_aggregation lets nobody see one: "
            "leave one of the two out"
        )
    if config.privacy.on and config.privacy.unit == "client":
        raise ValueError(
            f"{rule} is no mean, and privacy.unit client's noise is measured by what one client can change in a mean: "
            "leave the rule out, or use unit example"
        )


def _robust_weights(config: Config, method: Method) -> None:
    """A weight is what a client says of itself."""
    if method.robust is not None and config.method.weights == "examples":
        raise ValueError(
            "method.weights examples would let a client count for as many as it says it has, and with "
            f"method.robust_rule {method.robust.name} all count alike: use equal, or leave it out"
        )


def _robust_start(config: Config, method: Method) -> None:
    """No rule stands between a single client and what is made of clients' answers before round 1."""
    if method.robust is None or not (adapter := make_adapter(config.adapter)).started:
        return
    rule, source = f"method.robust_rule {method.robust.name}", adapter.origin.source
    if source not in ("weights", "public"):
        raise ValueError(
            f"{rule} does not reach the bases that adapter.subspace {source} takes from the sum of clients' gradients: "
            "use adapter.subspace weights or public"
        )
    if config.siloed:
        raise ValueError(
            f"{rule} does not reach what adapter {adapter.kind} takes from one client's own nodes before round 1: use "
            "adapter.kind lora or ravan"
        )


def _columns(config: Config, method: Method) -> None:
    data = config.data
    if data.partition == "column" and data.column is None and data.source != BUILTIN:
        raise ValueError("data.partition column needs data.column, the column whose values are the clients")


def _task(config: Config, method: Method) -> None:
    """What the task itself does not take."""
    check_task(config)


def _sources(config: Config, method: Method) -> None:
    """Clients with a source of their own."""
    sources = [name for name, client in config.clients.items() if client.source is not None]
    if not sources:
        return
    if without := [name for name in config.clients if name not in sources]:
        raise ValueError(f"clients.{without[0]} has no source, while others have: give every client its own")
    _nothing_to_deal(config, len(sources))


def _nothing_to_deal(config: Config, sources: int) -> None:
    """Examples that come from as many sources as clients are not dealt out."""
    for key, given in (("limit", config.data.limit is not None), ("partition", config.data.partition != "iid")):
        if given:
            raise ValueError(f"data.{key} deals out one source, but every client has its own: leave it out")
    if config.federation.clients not in (None, sources):
        raise ValueError(
            f"federation.clients is {config.federation.clients}, but {sources} clients have a source: leave it out"
        )


def _silo_sources(config: Config, method: Method) -> None:
    """Clients that stay on their own nodes have all that they need there."""
    if not config.siloed:
        return
    for name, client in config.clients.items():
        if client.node_labels is None:
            raise ValueError(f"clients.{name} has no node_labels, while others have: give every client its own")
        if client.source is None:
            raise ValueError(
                f"clients.{name}.node_labels without clients.{name}.source: "
                "data that all read cannot stay on some nodes; give each client its own"
            )
        if _relative(client.source):
            raise ValueError(
                f"clients.{name}.source '{client.source}' is read on the client's own nodes: "
                "give its absolute path there"
            )


def _relative(source: str) -> bool:
    """Whether a source is a place on this machine that another one would look for elsewhere."""
    local = Path(source).suffix in FILES or source.startswith((".", "~"))
    return local and not source.startswith("/")


def _silos(config: Config, method: Method) -> None:
    """Nothing that the driver, or another node, would need of clients that stay on their own nodes."""
    if not config.siloed:
        return
    if config.engine == "inline":
        raise ValueError("clients.NAME.node_labels need engine ray: inline there is one process, on this machine")
    if config.privacy.sweep_epsilon is not None and config.privacy.unit == "example":
        raise ValueError(
            "privacy.sweep_epsilon needs the clients' numbers of examples before a sweep starts, "
            "and clients with node_labels keep them: leave it out"
        )
    if config.data.source == BUILTIN:
        raise ValueError("clients.NAME.node_labels: give data.source, held-out examples that every node may read")


def _wire(config: Config, method: Method) -> None:
    """Who counts on every digit of what is sent."""
    reasons = {
        "privacy.secure_aggregation adds whole numbers of its own": config.privacy.secure_aggregation,
        "privacy counts what clients send, and what rounding leaves would stay with them without noise": (
            config.privacy.on
        ),
        f"{method.name}'s second message is worked out from the first one's digits": method.asks,
    }
    if config.federation.wire != "fp32":
        _refuse(f"federation.wire {config.federation.wire}", reasons, "leave it out")


def _buffer(config: Config, method: Method) -> None:
    """Updates that start from different rounds are added as changes of the same factors."""
    section = config.federation
    if section.buffer is None:
        if section.replay is not None:
            raise ValueError("federation.replay takes the steps of a run with federation.buffer: give the same buffer")
        return
    changes = method.linear and not (method.alternates or method.kept or method.personal or method.asks)
    reasons = {
        f"{method.name} averages something else than changes of the same factors in every round": not changes,
        "privacy and secure sums are of one round's clients": config.privacy.on or config.privacy.secure_aggregation,
        "federation.wire measures what is sent from the newest round": section.wire != "fp32",
        "federation.keep_optimizer goes from round to round": section.keep_optimizer,
        "federation.cohort draws who trains": section.cohort is not None,
        "federation.quorum and federation.deadline are about rounds that end for all": (
            section.quorum < 1 or section.deadline is not None
        ),
        "worker.batch_clients train from one round": config.worker.batch_clients > 1,
        "engine inline has nobody arrive while another trains (federation.replay needs no Ray)": (
            config.engine == "inline" and section.replay is None
        ),
    }
    _refuse(f"federation.buffer {section.buffer}", reasons, "leave one out")


def _checkpoints(config: Config, method: Method) -> None:
    """What was spent must be known wherever a run goes on."""
    if config.output.checkpoints is not None and (config.privacy.on or config.privacy.secure_aggregation):
        raise ValueError(
            "output.checkpoints would let a private run go on without the ledger of what it has spent, which is in "
            "output.dir: leave it out, and put output.dir on storage that stays"
        )


def _profile(config: Config, method: Method) -> None:
    if config.worker.profile is not None and config.privacy.on:
        raise ValueError(
            "worker.profile writes shapes and times of private examples into a file: leave it out in a private run"
        )


def _memory(config: Config, method: Method) -> None:
    """What may be saved of a step's memory and time."""
    by_example = config.privacy.on and config.privacy.unit == "example"
    if config.model.compute == "bfloat16":
        reasons = {"privacy.unit example clips gradients of fp32, which bfloat16 rounds beyond the clip": by_example}
        _refuse("model.compute bfloat16", reasons, "leave it out")
    if config.model.checkpointing and config.worker.batch_clients > 1:
        raise ValueError(
            f"model.checkpointing cannot be: worker.batch_clients {config.worker.batch_clients} replaces layers for "
            "the time of one pass, and a second one would see others; leave one out"
        )
    if config.data.group_by_length and by_example:
        raise ValueError(
            "data.group_by_length cannot be: privacy.unit example draws each example by itself, whatever its length "
            "(its micro-batches are put in order of their lengths anyway); leave it out"
        )
    if config.model.quantise is not None:
        reasons = {
            "it needs bitsandbytes, which fedray[quantised] installs": importlib.util.find_spec("bitsandbytes") is None,
            "worker.zero_stage 3 partitions the base's weights": 3 in _stages(config),
        }
        _refuse(f"model.quantise {config.model.quantise}", reasons, "leave one out")
    if config.model.loss_chunk is not None:
        reasons = {
            "a classifier has no logits by token": TASKS[config.model.task].model == "classification",
            "worker.zero_stage 3 has a part of the layer that makes the logits": 3 in _stages(config),
        }
        _refuse("model.loss_chunk", reasons, "leave it out")


def _together(config: Config, method: Method) -> None:
    """Clients train together over one base, each as it would alone."""
    if config.worker.batch_clients == 1:
        return
    reasons = {
        f"the clients of {method.name} have bases of their own here": method.personal,
        "the clients of silos train on their own machines": config.siloed,
        "federation.keep_optimizer brings optimizers that have taken different numbers of steps": (
            config.federation.keep_optimizer
        ),
        "privacy.unit example clips each example by itself": config.privacy.on and config.privacy.unit == "example",
        f"worker.zero_stage {config.worker.zero_stage} partitions the model": config.worker.zero_stage > 0,
        "worker.profile traces one client": config.worker.profile is not None,
        "the ranks of a worker deal out one client's batches": config.most_ranks > 1,
    }
    _refuse(f"worker.batch_clients {config.worker.batch_clients}", reasons, "leave one out")


def _ranks(config: Config, method: Method) -> None:
    """Several processes that take one client's steps."""
    for name in ("", *config.clients):
        worker, where = (config.worker_of(name), f"clients.{name}") if name else (config.worker, "worker")
        micro_batch = config.client(name).micro_batch
        if worker.ranks > 1 and worker.backend != "deepspeed":
            raise ValueError(f"{where}.ranks {worker.ranks} needs worker.backend deepspeed, which makes them one")
        if micro_batch < worker.ranks:
            raise ValueError(
                f"{where}.ranks {worker.ranks} have {micro_batch} examples at once to deal out (federation.batch_size "
                "by federation.accumulate): raise the first, or lower the second or the ranks"
            )
    if config.engine == "inline" and (config.mixed or config.worker.ranks > 1):
        raise ValueError("worker.ranks and workers of some clients' own need engine ray: inline is one process")


def _stages(config: Config) -> list[int]:
    """Of ZeRO, of the workers and of every client that has its own."""
    return [config.worker.zero_stage, *(config.worker_of(name).zero_stage for name in config.clients)]


def _offload(config: Config, method: Method) -> None:
    """DeepSpeed offloads what ZeRO partitions."""
    worker = config.worker
    least = {"none": 0, "optimizer": 1, "all": 3}[worker.offload]
    if min(_stages(config)) < least:
        raise ValueError(f"worker.offload {worker.offload} needs worker.zero_stage {least} or more for every client")
    if worker.offload != "none" and worker.backend != "deepspeed":
        raise ValueError("worker.offload is DeepSpeed's: use worker.backend deepspeed, or leave it out")


#: In the order in which they are made: the first sentence is the one that a person sees.
CHECKS: tuple[Callable[[Config, Method], None], ...] = (
    check_privacy,
    _batches,
    _rounds,
    _best,
    _robust,
    _robust_weights,
    _robust_start,
    _columns,
    _task,
    _sources,
    _silo_sources,
    _silos,
    _wire,
    _buffer,
    _checkpoints,
    _profile,
    _memory,
    _together,
    _ranks,
    _offload,
)
