"""The sections of a config: types, bounds of single fields, and each field's doc, which is its line in `--help`.

The options of methods and adapters are declared by these. What does not go together is refused in `checks`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BeforeValidator, Field

from fedray.adapters import ADAPTERS
from fedray.config import forms
from fedray.config.declared import Declared, of_one, of_register, of_tasks, with_options
from fedray.config.privacy import PrivacySection
from fedray.config.section import Section
from fedray.data.builtin import BUILTIN
from fedray.data.tasks import TASKS
from fedray.data.tasks.tokens import COMPLETION
from fedray.errors import ConfigError, nearest
from fedray.methods import METHODS, RobustOptions, ServerOptimizer

DEFAULT_CLIENTS = 5
SERVER, ROBUST = "server_", "robust_"
METHOD_OPTIONS = of_register("method", METHODS)
SERVER_OPTIONS = of_one("server optimizer", SERVER, ServerOptimizer)
ROBUST_OPTIONS = of_one("robust rule", ROBUST, RobustOptions)
ADAPTER_OPTIONS = of_register("adapter", ADAPTERS)
TASK_OPTIONS = of_tasks(TASKS, ("text_pair", "completion"))
_KINDS = " or ".join(", ".join(ADAPTERS).rsplit(", ", 1))
_MIXED_RANKS = ", ".join(name for name, method in METHODS.items() if method.mixed_ranks)


Rank = Annotated[int, Field(ge=1)]


def _set(section: Section, declared: Mapping[str, Declared]) -> dict[str, Any]:
    return {name: value for name in declared if (value := getattr(section, name)) is not None}


def _named(ranks: Mapping[str, int], clients: Sequence[str]) -> dict[str, int]:
    """The ranks in the order of the clients. Raises ConfigError where their names are not the clients'."""
    if strange := [name for name in ranks if name not in clients]:
        raise ConfigError(
            f"adapter.rank names '{strange[0]}', which is not a client of this run{nearest(strange[0], clients)}"
        )
    if without := [name for name in clients if name not in ranks]:
        raise ConfigError(
            f"adapter.rank names no rank for client '{without[0]}': name every client, or give one rank for all"
        )
    return {name: ranks[name] for name in clients}


def _known_task(name: str) -> str:
    """The name of a registered task."""
    if name not in TASKS:
        raise ValueError(f"input should be {' or '.join(map(repr, sorted(TASKS)))}")
    return name


class ModelSection(Section):
    """The frozen base model."""

    path: str = BUILTIN
    """Hub id or folder of the base model; `builtin` is the tiny byte-level Llama that ships with fedray."""
    task: Annotated[str, AfterValidator(_known_task)] = "causal-lm"
    """What the model is trained for."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen base; adapters and heads are always fp32."""
    quantise: Literal["nf4", "int8"] | None = None
    """Keep the frozen base in so many bits (fedray[quantised]; default: in `dtype`). What a method writes into the base
    stays beside it, as factors of at most `base_rank`."""
    base_rank: int = Field(128, ge=1)
    """quantise: highest rank of the base update that is kept in a layer; what is cut off is reported as store_error."""
    compute: Literal["bfloat16"] | None = None
    """Multiply matrices of the base and the adapters in this dtype (autocast; default: each in its own); what trains
    stays fp32."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Implementation of attention (default: transformers' own choice)."""
    checkpointing: bool = False
    """Keep only each block's input for the backward pass, and work out what is inside once more: less memory, a third
    more time."""
    loss_chunk: int | None = Field(None, ge=1)
    """Tokens whose logits are there at once in the loss of next-token prediction (default: all of a batch's): less
    memory where the vocabulary is large, in the same time."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout inside the base model (default: as its own config says; 0 in example-level private runs, which admit no
    other)."""


@with_options(ADAPTER_OPTIONS)
class AdapterSection(Section):
    """The low-rank adapter."""

    kind: str = Field("lora", description=f"Parametrisation of the update: {_KINDS}.")
    rank: Annotated[Rank | tuple[Rank, ...] | dict[str, Rank], BeforeValidator(forms.ranks)] = Field(
        8,
        description="Rank r of every layer's adapter; a list in client order (8,4,4) or NAME=RANK pairs "
        f"where clients differ ({_MIXED_RANKS}).",
    )
    alpha: float | None = Field(None, gt=0)
    """alpha / rank multiplies the product of the factors, abba: alpha^2 / sqrt(r1 r2) (default 16; lora-sb and ravan:
    the rank)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: Annotated[str | tuple[str, ...], BeforeValidator(forms.names)] = "all-linear"
    """Layers to adapt: PEFT's names, comma-separated (q_proj,v_proj), a regular expression, or all-linear."""
    heads: Annotated[tuple[str, ...], BeforeValidator(forms.heads)] = ()
    """Modules trained whole beside PEFT's own choice for the task (the classifier)."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that some adapter declares; None where it is not set."""

    @property
    def options(self) -> dict[str, Any]:
        """The adapters' options that are set."""
        return _set(self, ADAPTER_OPTIONS)

    @property
    def largest_rank(self) -> int:
        """The rank that every model hosts; clients of a smaller one use its first components."""
        if isinstance(self.rank, int):
            return self.rank
        return max(self.rank.values() if isinstance(self.rank, dict) else self.rank)

    def ranks(self, clients: Sequence[str]) -> dict[str, int]:
        """The rank of each client where they differ, else empty. Raises ConfigError when they do not fit."""
        if isinstance(self.rank, int):
            return {}
        if isinstance(self.rank, dict):
            return _named(self.rank, clients)
        if len(self.rank) != len(clients):
            raise ConfigError(
                f"adapter.rank lists {len(self.rank)} ranks for {len(clients)} clients: "
                "give one for each, or NAME=RANK pairs"
            )
        return dict(zip(clients, self.rank, strict=True))


@with_options(METHOD_OPTIONS | SERVER_OPTIONS | ROBUST_OPTIONS)
class MethodSection(Section):
    """How the clients' updates become one."""

    name: str = "fedex"
    """One of those that `fedray methods` lists."""
    weights: Literal["examples", "equal"] | None = None
    """Weigh a client by its (in a private run: noised) number of training examples, or all alike (default: examples;
    equal with privacy.unit client and with method.robust_rule)."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that some method, a server optimizer or a robust rule declares; None where it is not set."""

    @property
    def options(self) -> dict[str, Any]:
        """The methods' options that are set."""
        return _set(self, METHOD_OPTIONS)

    @property
    def server_options(self) -> dict[str, Any]:
        """The server optimizer's options that are set, by its own names for them."""
        return {name.removeprefix(SERVER): value for name, value in _set(self, SERVER_OPTIONS).items()}

    @property
    def robust_options(self) -> dict[str, Any]:
        """The robust rule's options that are set, by its own names for them."""
        return {name.removeprefix(ROBUST): value for name, value in _set(self, ROBUST_OPTIONS).items()}


@with_options(TASK_OPTIONS)
class DataSection(Section):
    """Where the examples are and how clients share them."""

    source: str = BUILTIN
    """`builtin`, a hub id, a folder of train/validation/test files, or one csv, tsv, jsonl, json or parquet file."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    train_split: str = "train"
    """Name of the training split."""
    test_split: str = "test"
    """Name of the held-out split; where a source has none, `held_out` of the training split is taken."""
    validation_split: str = "validation"
    """Name of the split that data.evaluate_on validation takes; where a source has none, `held_out` of the rest of the
    training split."""
    evaluate_on: Literal["test", "validation"] = "test"
    """What the metrics are of; `fedray compare` tunes on validation, which shares no example with test."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the training split held out at the coordinator where the source has no such split; the same for every
    seed."""
    text: str | None = None
    """Column with the text (default: text, sentence, content or question, whichever is there)."""
    text_pair: str | None = None
    """Column with a second text (classification and regression of pairs)."""
    label: str = "label"
    """Column with the class (classification) or the number (regression)."""
    completion: str | None = Field(None, description=COMPLETION)
    max_length: int = Field(256, ge=2)
    """Longest sequence in tokens."""
    group_by_length: bool = False
    """Batches of sequences of similar lengths: less padding; each is still taken once an epoch."""
    partition: Literal["iid", "dirichlet", "pathological", "shards", "quantity", "column"] = "iid"
    """How examples are dealt to clients: alike; shares of each `label` from a Dirichlet distribution; few labels each;
    shards of the examples in order of their labels; many to one and few to another; by a column. The built-in corpus
    is always split by package."""
    alpha: float = Field(0.5, gt=0)
    """dirichlet, quantity: concentration; smaller is less even."""
    labels_per_client: int = Field(2, ge=1)
    """pathological: so many labels each."""
    shards_per_client: int = Field(2, ge=1)
    """shards: so many each."""
    column: str | None = None
    """column: the column whose values are the clients."""
    limit: int | None = Field(None, ge=1)
    """Use only this many training examples, drawn by the seed."""
    test_limit: int | None = Field(None, ge=1)
    """Evaluate on only this many held-out examples (nlg: inputs, with all their references), drawn by the seed."""
    client_held_out: float = Field(0.0, ge=0, lt=1)
    """Share of each client's own examples kept for evaluation on the client; 0 evaluates at the coordinator's side
    only."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """A key that some task declares; None where it is not set."""


class GenerationSection(Section):
    """How answers are produced where a task's metrics are of what the model says (math, nlg, choice)."""

    max_new_tokens: int = Field(256, ge=1)
    """Most tokens of an answer."""
    temperature: float = Field(0.0, ge=0)
    """0: greedy, the likeliest token each time; else tokens are drawn, by the seed."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Draw among the likeliest tokens that together have this probability."""


class FederationSection(Section):
    """The federated rounds and each client's local training."""

    clients: int | None = Field(None, ge=1)
    """Number of clients (default: 5, or as the column or the `clients` section says)."""
    rounds: int = Field(5, ge=1)
    """Number of rounds."""
    cohort: int | None = Field(None, ge=1)
    """Clients drawn a round (default: all)."""
    local_steps: int = Field(16, ge=1)
    """Optimizer steps a client takes a round."""
    batch_size: int = Field(4, ge=1)
    """Examples an optimizer step."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches that make up one batch."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Local optimizer."""
    lr: float = Field(5e-3, gt=0)
    """Peak learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (adamw) or L2 (sgd)."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate over the steps: constant, or falling to 0."""
    schedule_over: Literal["run", "round"] = "run"
    """Whether schedule and warm-up span the whole run or start again every round."""
    warmup: float = Field(0.05, ge=0, lt=1)
    """Share of the schedule spent warming up linearly."""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Clip the norm of a step's gradient; null switches it off. A private step has privacy.clip instead."""
    proximal: float = Field(0.0, ge=0)
    """FedProx: mu of mu/2 ||w - w_broadcast||^2 in each client's loss, over all that trains."""
    keep_optimizer: bool = False
    """Keep each client's optimizer state from round to round instead of starting it afresh."""
    max_bytes: float | None = Field(None, gt=0)
    """End the run before a round that, moving as much as the last one, would bring all uploads and downloads above
    this."""
    evaluate_every: int = Field(1, ge=1)
    """Rounds between evaluations; the first and the last state are always evaluated."""
    patience: int | None = Field(None, ge=1)
    """End the run after so many evaluations without a better one, by the task's metric; needs data.evaluate_on
    validation."""
    best_round: bool = False
    """The result (adapter, exports, final metrics) is the state of the best round that was evaluated, and not of the
    last; needs data.evaluate_on validation."""
    deadline: float | None = Field(None, gt=0)
    """Seconds a round may take; a client that is not done is left out."""
    quorum: float = Field(1.0, gt=0, le=1)
    """Share of the cohort that must report, else the round is tried once more and then fails."""
    max_update_norm: float | None = Field(None, gt=0)
    """Leave out a client whose update moved further than this (Frobenius norm over all that it sends, from what it was
    sent). What is not finite, or has other names or shapes, is left out always."""
    max_update_ratio: float | None = Field(None, ge=1)
    """The same, as a multiple of the median of the round's updates (of three at least)."""
    buffer: int | None = Field(None, ge=1)
    """Wait for nobody in particular: as soon as so many updates have arrived they are one round's (FedBuff), and count
    by 1 / sqrt(1 + d) where they started d rounds before. Everybody else goes on training."""
    replay: str | None = None
    """Directory of a run with federation.buffer: take the same steps from its log, on any engine."""
    wire: Literal["fp32", "bf16", "int8"] = "fp32"
    """What updates travel as: in bf16 (2 bytes a number) or int8 (1, and 4 for 256 of them) what rounding took is in
    rounds.jsonl, and comes with the client's next update where the method's broadcast is the mean of them."""
    wire_feedback: bool = True
    """Whether clients keep what rounding took. It is as large as an update in fp32, and kept as an optimizer's state
    is: in Ray's object store and the checkpoint."""
    exact_report: bool = False
    """Measure what a round and plain averaging lost in large cohorts too, where it is estimated otherwise, with its
    standard error in rounds.jsonl: costs what forming each layer's matrix costs."""

    @property
    def micro_batch(self) -> int:
        """Examples in memory at once."""
        return self.batch_size // self.accumulate


class ClientSection(Section):
    """What differs for one client."""

    source: str | None = None
    """This client's own training data (a file or a folder); given for one client, it must be given for all."""
    node_labels: Annotated[dict[str, str] | None, BeforeValidator(forms.labels)] = Field(None, min_length=1)
    """Ray labels of the nodes that may read this client's data and train it, as `ray start --labels silo=a` gives
    them; for one, then for all."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate."""
    local_steps: int | None = Field(None, ge=1)
    """Optimizer steps a round."""
    batch_size: int | None = Field(None, ge=1)
    """Examples an optimizer step."""
    gpus: float | None = Field(None, ge=0)
    """GPUs each rank of the workers that serve this client."""
    ranks: int | None = Field(None, ge=1)
    """Ranks of the workers that serve this client."""
    zero_stage: int | None = Field(None, ge=0, le=3)
    """DeepSpeed ZeRO stage of the workers that serve this client."""


class WorkerSection(Section):
    """The actors that train; 'auto' is decided by what the cluster has and said in the plan."""

    count: int | None = Field(None, ge=1)
    """Workers (default: as many as clients, as far as GPUs or CPUs go); with clients.NAME.node_labels of each place."""
    gpus: float | None = Field(None, ge=0)
    """GPUs a rank, fractions allowed (default: 1 where there are GPUs, else 0)."""
    cpus: int | None = Field(None, ge=1)
    """CPUs and threads a rank (default: an even share)."""
    ranks: int = Field(1, ge=1)
    """Ranks a worker: processes, each with its own GPUs and CPUs, that take one client's steps together, every batch
    dealt out among them and the model's states partitioned by worker.zero_stage."""
    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed, or the plain PyTorch loop that is its oracle."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the machine's memory instead of the GPU's: optimizer (ZeRO 1 to 3), or all (ZeRO 3: the
    parameters too)."""
    batch_clients: int = Field(1, ge=1)
    """Clients that train together in one pass over the base that they share, for simulations: as one after the other
    to 1e-5, and so many times the activations."""
    cache: str | None = None
    """Folder on each worker's machine where tokenised data are kept for other processes to map (default: nowhere;
    `fedray sweep`: a folder of its own)."""
    profile: str | None = Field(None, pattern=r".+:\d+$")
    """CLIENT:ROUND: write a trace of that client's local training in that round (PyTorch's profiler) to
    RUN_DIR/profile, for chrome://tracing or Perfetto."""
    wait: float | None = Field(None, gt=0)
    """Seconds to wait for machines that an autoscaler brings; worker.count and worker.gpus must then say what to bring
    (default: use what is there)."""


class OutputSection(Section):
    """Where results go."""

    dir: str | None = None
    """Run directory (default: runs/METHOD-TIME)."""
    resume: bool = False
    """Go on from the directory's last checkpoint; without one, start."""
    keep: int = Field(2, ge=1)
    """Checkpoints that are kept, beside that of the run's result."""
    checkpoints: str | None = None
    """URI of a second place for them, from which output.resume goes on where output.dir is empty: whatever pyarrow or
    fsspec reaches, such as s3://bucket/run."""
    track: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], BeforeValidator(forms.trackers)] = (
        "tensorboard",
    )
    """Where each round's numbers go beside rounds.jsonl; null: nowhere. mlflow and wandb need fedray[track] and take
    their own environment variables."""


class Config(Section):
    """Everything a run is. Equal configs on the same CPU give equal bits."""

    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    method: MethodSection = MethodSection()
    data: DataSection = DataSection()
    generation: GenerationSection = GenerationSection()
    federation: FederationSection = FederationSection()
    clients: dict[str, ClientSection] = {}  # noqa: RUF012 - pydantic copies it
    """Per client: clients.NAME.source, .node_labels, .lr, .local_steps, .batch_size, .gpus, .ranks, .zero_stage."""
    worker: WorkerSection = WorkerSection()
    privacy: PrivacySection = PrivacySection()
    output: OutputSection = OutputSection()
    seed: int = 0
    """Seed of everything random."""
    engine: Literal["ray", "inline"] = "ray"
    """ray: coordinator and workers are actors; inline: one process, same numbers."""

    @property
    def siloed(self) -> bool:
        """Whether every client's data are read on its own nodes only: not by the driver, the coordinator, or another
        client's worker."""
        return any(c.node_labels is not None for c in self.clients.values())

    @property
    def base_dropout(self) -> float | None:
        """Dropout inside the base model; None: as the model's own config says. None of it in DP-SGD's steps, see
        `fedray.federation.channels.example`."""
        return 0.0 if self.privacy.on and self.privacy.unit == "example" else self.model.dropout

    @property
    def by_examples(self) -> bool:
        """Whether a client's update counts with its number of examples."""
        alike = self.method.robust_rule is not None or (self.privacy.on and self.privacy.unit == "client")
        return self.method.weights != "equal" and not alike

    def client(self, name: str) -> FederationSection:
        """The federation section as it holds for one client."""
        if (section := self.clients.get(name)) is None:
            return self.federation
        differing = section.model_dump(exclude_none=True, include=set(FederationSection.model_fields))
        return self.federation.model_copy(update=differing)

    def worker_of(self, name: str) -> WorkerSection:
        """The worker section as it holds for the workers that serve one client."""
        if (section := self.clients.get(name)) is None:
            return self.worker
        differing = section.model_dump(exclude_none=True, include=set(WorkerSection.model_fields))
        return self.worker.model_copy(update=differing)

    @property
    def most_ranks(self) -> int:
        """Of any client's workers."""
        return max([self.worker.ranks, *(self.worker_of(name).ranks for name in self.clients)])

    @property
    def mixed(self) -> bool:
        """Whether some clients' workers are others than `worker` says."""
        return any(self.worker_of(name) != self.worker for name in self.clients)

    def to_yaml(self) -> str:
        """All keys, defaults included; `read_config(["--config", file])` gives the same config back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
