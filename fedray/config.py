"""One frozen, validated, serialisable config for everything that runs. Each field's doc is its line in `--help`.

`read_config(argv)` is how a person's YAML file and dotted flags become one; it raises ConfigError with one sentence.
What can only be known from the model or the data is checked by `fedray.federation.run.prepare`, before anything is touched.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from fedray.adapters import ADAPTERS, Layer, make_adapter
from fedray.argv import flags as argv_flags
from fedray.errors import ConfigError
from fedray.methods import METHODS, FedExKeep, Method, ServerOptimizer, Spec, why_not

BUILTIN = "builtin"
DEFAULT_CLIENTS = 5


def _ranks(value: Any) -> Any:
    """`8`, `8,4,4` or `{ward: 4, icu: 8}` (on the command line: ward=4,icu=8)."""
    if isinstance(value, str) and "=" in value:
        pairs = [part.split("=", 1) for part in value.split(",")]
        if bad := next((pair for pair in pairs if len(pair) != 2 or not pair[0] or not pair[1].isdigit()), None):
            raise ValueError(f"'{'='.join(bad)}' is no NAME=RANK: write client-0=8,client-1=4")
        return dict(pairs)
    return _names(value)


def _labels(value: Any) -> Any:
    """`{silo: a, zone: in(x,y)}`; on the command line silo=a,zone=in(x,y)."""
    if not isinstance(value, str):
        return value
    pairs = [part.split("=", 1) for part in re.split(r",(?![^()]*\))", value)]
    if bad := next((pair for pair in pairs if len(pair) != 2 or not all(pair)), None):
        raise ValueError(f"'{'='.join(bad)}' is no KEY=VALUE: write silo=a,zone=b")
    return dict(pairs)


def _names(value: Any) -> Any:
    return tuple(v.strip() for v in value.split(",")) if isinstance(value, str) and "," in value else value


def _trackers(value: Any) -> Any:
    return () if value is None else (value,) if isinstance(found := _names(value), str) else found


Rank = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Base of all sections: frozen, and strict about unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelSection(Section):
    """The frozen base model."""

    path: str = BUILTIN
    """Hub id or folder of the base model; `builtin` is the tiny byte-level Llama that ships with fedray."""
    task: Literal["causal-lm", "classification"] = "causal-lm"
    """What the model is trained for."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the frozen base; adapters and heads are always fp32."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout inside the base model (default: as its own config says; 0 in example-level private runs, which admit no other)."""


class AdapterSection(Section):
    """The low-rank adapter."""

    kind: str = "lora"
    """Parametrisation of the update: lora, lora-sb, abba or ravan."""
    rank: Annotated[Rank | tuple[Rank, ...] | dict[str, Rank], BeforeValidator(_ranks)] = 8
    """Rank r of every layer's adapter; a list in client order (8,4,4) or NAME=RANK pairs where clients differ (flora, flexlora, hetlora)."""
    alpha: float | None = Field(None, gt=0)
    """alpha / rank multiplies the product of the factors, abba: alpha^2 / sqrt(r1 r2) (default 16; lora-sb and ravan: the rank)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (Kalajdzievski, 2023)."""
    scale: Literal["paper", "released"] | None = None
    """abba: alpha^2 / sqrt(r1 r2) (paper, default), or alpha, as the authors' released code has it."""
    cores: int | None = Field(None, ge=1)
    """ravan: number of bases and cores h, each of the rank (default 4)."""
    subspace: Literal["weights", "gradient", "gradient-raw", "public", "private"] | None = None
    """lora-sb: bases from the SVD of the weights (default), the clients' summed gradient with or without sign, a public data set, or clipped and noised gradients."""
    subspace_examples: int | None = Field(None, ge=1)
    """lora-sb: examples a client takes the gradient over (default 64)."""
    subspace_source: str | None = None
    """lora-sb, subspace public: the public data set (a hub id, a folder or a file), with the columns of the data section."""
    subspace_oversample: int | None = Field(None, ge=0)
    """lora-sb, subspace gradient-raw and public: columns beyond the rank of the range finder (default 16)."""
    subspace_passes: int | None = Field(None, ge=0)
    """lora-sb, subspace gradient-raw and public: power iterations of the range finder, two uploads each (default 2)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    targets: Annotated[str | tuple[str, ...], BeforeValidator(_names)] = "all-linear"
    """Layers to adapt: PEFT's names, comma-separated (q_proj,v_proj), a regular expression, or all-linear."""
    heads: Annotated[
        tuple[str, ...], BeforeValidator(lambda v: tuple(n for n in v.split(",") if n) if isinstance(v, str) else v)
    ] = ()
    """Modules trained whole beside PEFT's own choice for the task (the classifier)."""

    @property
    def largest_rank(self) -> int:
        """The rank that every model hosts; clients of a smaller one use its first components."""
        if isinstance(self.rank, int):
            return self.rank
        return max(self.rank.values() if isinstance(self.rank, dict) else self.rank)

    def ranks(self, clients: Sequence[str]) -> dict[str, int]:
        """The rank of each client where they differ, else empty. Raises ConfigError when they do not fit the clients."""
        if isinstance(self.rank, int):
            return {}
        if isinstance(self.rank, tuple):
            if len(self.rank) != len(clients):
                raise ConfigError(
                    f"adapter.rank lists {len(self.rank)} ranks for {len(clients)} clients: give one for each, or NAME=RANK pairs"
                )
            return dict(zip(clients, self.rank, strict=True))
        if strange := [name for name in self.rank if name not in clients]:
            raise ConfigError(
                f"adapter.rank names '{strange[0]}', which is not a client of this run{nearest(strange[0], clients)}"
            )
        if without := [name for name in clients if name not in self.rank]:
            raise ConfigError(
                f"adapter.rank names no rank for client '{without[0]}': name every client, or give one rank for all"
            )
        return {name: self.rank[name] for name in clients}


class MethodSection(Section):
    """How the clients' updates become one."""

    name: str = "fedex"
    """One of those that `fedray methods` lists."""
    weights: Literal["examples", "equal"] | None = None
    """Weigh a client by its (in a private run: noised) number of training examples, or all alike (default: examples; equal with privacy.unit client)."""
    assignment: Literal["average", "reinit", "keep"] | None = None
    """fedex: the factors that clients go on with (default average)."""
    residual_rank: int | None = Field(None, ge=1)
    """fedex, flora: truncate the base update to this rank; what is cut off is reported as exactness."""
    split: Literal["orthonormal", "balanced"] | None = None
    """fra, fra-ffa, flexlora, florist: where the singular values go (default orthonormal: all on B)."""
    residual: Literal["drop", "fold"] | None = None
    """fra, florist: drop the tail beyond rank r (the paper, default) or fold it into the base."""
    fra_rounds: int | None = Field(None, ge=1)
    """fra-ffa: rounds of FRA before A is frozen (default: half of all rounds)."""
    energy: float | None = Field(None, gt=0, le=1)
    """florist: share of sum S_j^2 that a layer's rank keeps (default 0.99)."""
    oversample: int | None = Field(None, ge=0)
    """fedask: columns of the sketch beyond the rank (default 8)."""
    correction: float | None = Field(None, gt=0)
    """lora-fair: weight of ||dB||^2 against the fit, relative to A's rows (default 0.01)."""
    sparse_scale: float | None = Field(None, gt=0)
    """fedrpca: how much the clients' own (sparse) part counts (default 2)."""
    server_optimizer: Literal["avgm", "adam", "yogi"] | None = None
    """Step of FedAvgM, FedAdam or FedYogi along the mean's change, for methods whose aggregate is a mean (default: take the mean)."""
    server_lr: float | None = Field(None, gt=0)
    """Server optimizer: learning rate (default 1)."""
    server_beta1: float | None = Field(None, ge=0, lt=1)
    """Server optimizer: momentum (default 0.9)."""
    server_beta2: float | None = Field(None, ge=0, lt=1)
    """Server optimizer, adam and yogi: decay of the second moment (default 0.99)."""
    server_tau: float | None = Field(None, gt=0)
    """Server optimizer, adam and yogi: what is added to its root (default 1e-3)."""


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
    """Name of the split that data.evaluate_on validation takes; where a source has none, `held_out` of the rest of the training split."""
    evaluate_on: Literal["test", "validation"] = "test"
    """What the metrics are of; `fedray compare` tunes on validation, which shares no example with test."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the training split held out at the coordinator where the source has no such split; the same for every seed."""
    text: str | None = None
    """Column with the text (default: text, sentence, content or question, whichever is there)."""
    text_pair: str | None = None
    """Column with a second text (classification of pairs)."""
    label: str = "label"
    """Column with the class (classification)."""
    completion: str | None = None
    """Column whose text is to be produced after `text` (causal-lm); the loss covers it alone."""
    max_length: int = Field(256, ge=2)
    """Longest sequence in tokens."""
    partition: Literal["iid", "dirichlet", "column"] = "iid"
    """How examples are dealt to clients; the built-in corpus is always split by package."""
    alpha: float = Field(0.5, gt=0)
    """dirichlet: concentration; smaller is less even."""
    column: str | None = None
    """column: the column whose values are the clients."""
    limit: int | None = Field(None, ge=1)
    """Use only this many training examples, drawn by the seed."""
    test_limit: int | None = Field(None, ge=1)
    """Evaluate on only this many held-out examples, drawn by the seed."""
    client_held_out: float = Field(0.0, ge=0, lt=1)
    """Share of each client's own examples kept for evaluation on the client; 0 evaluates at the coordinator's side only."""


class FederationSection(Section):
    """The federated rounds and each client's local training."""

    clients: int | None = Field(None, ge=1)
    """Number of clients (default: 5 for iid and dirichlet; otherwise as the column or the `clients` section says)."""
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
    """End the run before a round that, moving as much as the last one, would bring all uploads and downloads above this."""
    evaluate_every: int = Field(1, ge=1)
    """Rounds between evaluations; the first and the last state are always evaluated."""
    deadline: float | None = Field(None, gt=0)
    """Seconds a round may take; a client that is not done is left out."""
    quorum: float = Field(1.0, gt=0, le=1)
    """Share of the cohort that must report, else the round is tried once more and then fails."""

    @property
    def micro_batch(self) -> int:
        """Examples in memory at once."""
        return self.batch_size // self.accumulate


class ClientSection(Section):
    """What differs for one client."""

    source: str | None = None
    """This client's own training data (a file or a folder); given for one client, it must be given for all."""
    node_labels: Annotated[dict[str, str] | None, BeforeValidator(_labels)] = Field(None, min_length=1)
    """Ray labels of the nodes that may read this client's data and train it, as `ray start --labels silo=a` gives them; for one, then for all."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate."""
    local_steps: int | None = Field(None, ge=1)
    """Optimizer steps a round."""
    batch_size: int | None = Field(None, ge=1)
    """Examples an optimizer step."""


class WorkerSection(Section):
    """The actors that train; 'auto' is decided by what the cluster has and said in the plan."""

    count: int | None = Field(None, ge=1)
    """Workers (default: as many as clients, as far as GPUs or CPUs go); with clients.NAME.node_labels of each place."""
    gpus: float | None = Field(None, ge=0)
    """GPUs a worker, fractions allowed (default: 1 where there are GPUs, else 0)."""
    cpus: int | None = Field(None, ge=1)
    """CPUs and threads a worker (default: an even share)."""
    ranks: int = Field(1, ge=1, le=1)
    """Ray actors a client; more than one comes later."""
    backend: Literal["deepspeed", "torch"] = "deepspeed"
    """DeepSpeed, or the plain PyTorch loop that is its oracle."""
    zero_stage: int = Field(0, ge=0, le=3)
    """DeepSpeed ZeRO stage."""
    cache: str | None = None
    """Folder on each worker's machine where tokenised data are kept for other processes to map (default: nowhere; `fedray sweep`: a folder of its own)."""
    profile: str | None = Field(None, pattern=r".+:\d+$")
    """CLIENT:ROUND: write a trace of that client's local training in that round (PyTorch's profiler) to RUN_DIR/profile, for chrome://tracing or Perfetto."""
    wait: float | None = Field(None, gt=0)
    """Seconds to wait for machines that an autoscaler brings; worker.count and worker.gpus must then say what to bring (default: use what is there)."""


class PrivacySection(Section):
    """Differential privacy: on as soon as epsilon or noise is given."""

    epsilon: float | None = Field(None, gt=0)
    """Budget of each client over the whole run, whatever reads its data; the noise is calibrated to it unless it is given."""
    delta: float | None = Field(None, gt=0, lt=1)
    """delta (default: a power of ten, at most a tenth of 1 / the largest client's examples; unit client: of 1 / clients)."""
    noise: float | None = Field(None, gt=0)
    """Noise multiplier: standard deviation of the noise over the clip (default: calibrated to epsilon)."""
    unit: Literal["example", "client"] = "example"
    """What is protected: each sequence, by noise at its client; or each client with all it has, by noise at a trusted coordinator."""
    clip: float | None = Field(None, gt=0)
    """Norm to which each example's gradient (example) or each client's whole update (client) is clipped (default 1)."""
    count_noise: float | None = Field(None, gt=0)
    """example: standard deviation of the noise on each client's number of examples, released once (default 20)."""
    subspace_fraction: float | None = Field(None, gt=0, lt=1)
    """adapter.subspace private: share of epsilon that the bases may spend (default 0.2)."""
    adaptive_clip: float | None = Field(None, gt=0, lt=1)
    """client: let the clip follow this quantile of the updates' norms (Andrew et al., NeurIPS 2021)."""
    secure_aggregation: bool = False
    """Let the coordinator see only the sum of the clients' updates (Bonawitz et al., CCS 2017)."""
    secure_threshold: float | None = Field(None, gt=0, le=1)
    """Share of a round's clients that must stay to the end for the sum to be opened (default: more than half)."""
    sweep_epsilon: float | None = Field(None, gt=0)
    """`fedray sweep`: budget of all trials together, which are releases of the same data; a single run is one trial."""
    key_dir: str | None = None
    """Where a client's machine keeps its noise keys (default: $XDG_STATE_HOME/fedray/keys, or ~/.local/state/fedray/keys)."""

    @property
    def on(self) -> bool:
        """Whether the run is differentially private."""
        return self.epsilon is not None or self.noise is not None


class OutputSection(Section):
    """Where results go."""

    dir: str | None = None
    """Run directory (default: runs/METHOD-TIME)."""
    resume: bool = False
    """Go on from the directory's last checkpoint; without one, start."""
    track: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], BeforeValidator(_trackers)] = (
        "tensorboard",
    )
    """Where each round's numbers go beside rounds.jsonl; null: nowhere. mlflow and wandb need fedray[track] and take their own environment variables."""


class Config(Section):
    """Everything a run is. Equal configs on the same CPU give equal bits."""

    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    method: MethodSection = MethodSection()
    data: DataSection = DataSection()
    federation: FederationSection = FederationSection()
    clients: dict[str, ClientSection] = {}
    """Per client: clients.NAME.source, .node_labels, .lr, .local_steps, .batch_size."""
    worker: WorkerSection = WorkerSection()
    privacy: PrivacySection = PrivacySection()
    output: OutputSection = OutputSection()
    seed: int = 0
    """Seed of everything random."""
    engine: Literal["ray", "inline"] = "ray"
    """ray: coordinator and workers are actors; inline: one process, same numbers."""

    @model_validator(mode="after")
    def _combinations(self) -> Config:
        make_method(self)
        from fedray.federation.channels.registry import check as check_privacy

        check_privacy(self, make_method(self))
        federation, data = self.federation, self.data
        batches = {"federation": federation.batch_size} | {
            f"clients.{n}": c.batch_size for n, c in self.clients.items() if c.batch_size
        }
        for where, batch in batches.items():
            if batch % federation.accumulate:
                raise ValueError(
                    f"federation.accumulate {federation.accumulate} does not divide {where}.batch_size {batch}: choose a divisor"
                )
        if federation.keep_optimizer and self.method.name == "rolora":
            raise ValueError(
                "federation.keep_optimizer does not fit rolora: each round trains the factor that the last one did not; leave it out"
            )
        if federation.deadline is not None and self.engine == "inline":
            raise ValueError("federation.deadline needs engine ray: inline clients run one after the other")
        if data.partition == "column" and data.column is None and data.source != BUILTIN:
            raise ValueError("data.partition column needs data.column, the column whose values are the clients")
        if data.text_pair is not None and self.model.task != "classification":
            raise ValueError("data.text_pair belongs to classification; for causal-lm give data.completion")
        if self.model.task == "classification" and data.source == BUILTIN:
            raise ValueError("the built-in corpus is for causal-lm: give data.source for classification")
        if self.model.task == "classification" and data.completion is not None:
            raise ValueError("data.completion belongs to causal-lm; for classification give data.label")
        if self.model.path == BUILTIN and self.model.task != "causal-lm":
            raise ValueError("the built-in model is for causal-lm: give model.path for classification")
        sources = [name for name, client in self.clients.items() if client.source is not None]
        if sources and len(sources) < len(self.clients):
            without = next(name for name in self.clients if name not in sources)
            raise ValueError(f"clients.{without} has no source, while others have: give every client its own")
        if sources:
            for key, unused in (("data.limit", data.limit is None), ("data.partition", data.partition == "iid")):
                if not unused:
                    raise ValueError(f"{key} deals out one source, but every client has its own: leave it out")
            if federation.clients not in (None, len(sources)):
                raise ValueError(
                    f"federation.clients is {federation.clients}, but {len(sources)} clients have a source: leave it out"
                )
        _check_silos(self)
        if self.worker.profile is not None and self.privacy.on:
            raise ValueError(
                "worker.profile writes shapes and times of private examples into a file: leave it out in a private run"
            )
        return self

    @property
    def siloed(self) -> bool:
        """Whether every client's data are read on its own nodes only: not by the driver, the coordinator, or another client's worker."""
        return any(c.node_labels is not None for c in self.clients.values())

    @property
    def base_dropout(self) -> float | None:
        """Dropout inside the base model; None: as the model's own config says. DP-SGD's steps admit none."""
        return 0.0 if self.privacy.on and self.privacy.unit == "example" else self.model.dropout

    @property
    def by_examples(self) -> bool:
        """Whether a client's update counts with its number of examples."""
        return self.method.weights != "equal" and not (self.privacy.on and self.privacy.unit == "client")

    def client(self, name: str) -> FederationSection:
        """The federation section as it holds for one client."""
        own = self.clients.get(name, ClientSection()).model_dump(exclude_none=True, exclude={"source", "node_labels"})
        return self.federation.model_copy(update=own)

    def to_yaml(self) -> str:
        """All keys, defaults included; `read_config(["--config", file])` gives the same config back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# Which keys belong to which method or adapter: any other use is refused.
_OPTIONS = {
    "assignment": ("fedex",),
    "residual_rank": ("fedex", "flora"),
    "split": ("fra", "fra-ffa", "flexlora", "florist"),
    "residual": ("fra", "florist"),
    "fra_rounds": ("fra-ffa",),
    "energy": ("florist",),
    "oversample": ("fedask",),
    "correction": ("lora-fair",),
    "sparse_scale": ("fedrpca",),
}
_ADAPTER_OPTIONS = {
    "scale": ("abba",),
    "cores": ("ravan",),
    **dict.fromkeys(
        ("subspace", "subspace_examples", "subspace_source", "subspace_oversample", "subspace_passes"), ("lora-sb",)
    ),
}


def _check_adapter(section: AdapterSection) -> None:
    if section.kind not in ADAPTERS:
        raise ValueError(f"adapter.kind '{section.kind}' is not known{nearest(section.kind, ADAPTERS)}")
    for option, kinds in _ADAPTER_OPTIONS.items():
        if getattr(section, option) is not None and section.kind not in kinds:
            raise ValueError(f"adapter.{option} belongs to {' and '.join(kinds)}, not to {section.kind}: leave it out")
    if section.rslora and section.kind == "abba":
        raise ValueError(
            "adapter.rslora scales B A by alpha / sqrt(rank), and abba has a scale of its own: use adapter.scale, or leave it out"
        )
    try:
        make_adapter(section).width(section.largest_rank)
    except ValueError as error:
        raise ValueError(str(error)) from None
    subspace = section.subspace or "weights"
    if subspace == "public" and section.subspace_source is None:
        raise ValueError("adapter.subspace public needs adapter.subspace_source, the public data set")
    for option, subspaces in (
        ("subspace_source", ("public",)),
        ("subspace_examples", ("public", "gradient", "gradient-raw")),
        ("subspace_oversample", ("public", "gradient-raw")),
        ("subspace_passes", ("public", "gradient-raw")),
    ):
        if getattr(section, option) is not None and subspace not in subspaces:
            raise ValueError(
                f"adapter.{option} belongs to adapter.subspace {' and '.join(subspaces)}, not to {subspace}: leave it out"
            )


def _check_silos(config: Config) -> None:
    """Raises ValueError for clients that could not be kept to their own nodes."""
    if not config.siloed:
        return
    for name, client in config.clients.items():
        if client.node_labels is None:
            raise ValueError(f"clients.{name} has no node_labels, while others have: give every client its own")
        if client.source is None:
            raise ValueError(
                f"clients.{name}.node_labels without clients.{name}.source: data that all read cannot stay on some nodes; give each client its own"
            )
        local = Path(client.source).suffix in (
            ".csv",
            ".tsv",
            ".jsonl",
            ".json",
            ".parquet",
        ) or client.source.startswith((".", "~"))
        if local and not client.source.startswith("/"):
            raise ValueError(
                f"clients.{name}.source '{client.source}' is read on the client's own nodes: give its absolute path there"
            )
    if config.engine == "inline":
        raise ValueError("clients.NAME.node_labels need engine ray: inline there is one process, on this machine")
    if config.privacy.sweep_epsilon is not None and config.privacy.unit == "example":
        raise ValueError(
            "privacy.sweep_epsilon needs the clients' numbers of examples before a sweep starts, and clients with node_labels keep them: leave it out"
        )
    if config.data.source == BUILTIN:
        raise ValueError("clients.NAME.node_labels: give data.source, held-out examples that every node may read")


def make_method(config: Config) -> Method:
    """The method value that a config means. Raises ValueError, with the reason, for what is not sound."""
    section, kind = config.method, config.adapter.kind
    _check_adapter(config.adapter)
    if section.name not in METHODS:
        raise ValueError(f"method.name '{section.name}' is not known{nearest(section.name, METHODS)}")
    if reason := why_not(section.name, kind):
        raise ValueError(f"method '{section.name}' does not fit adapter '{kind}': {reason}")
    method, options, server = METHODS[section.name], {}, {}
    for option, value in section.model_dump(exclude={"name", "weights"}, exclude_none=True).items():
        if option.startswith("server_"):
            server[option.removeprefix("server_")] = value
        elif section.name not in _OPTIONS[option]:
            raise ValueError(
                f"method.{option} belongs to {' and '.join(_OPTIONS[option])}, not to {section.name}: leave it out"
            )
        else:
            options[option] = value
    if not isinstance(config.adapter.rank, int) and not method.mixed_ranks:
        several = ", ".join(name for name, m in METHODS.items() if m.mixed_ranks)
        raise ValueError(
            f"adapter.rank differs between clients, and {section.name} needs one rank for all: use {several}"
        )
    if options.get("assignment") == "keep":
        if kind != "lora":
            raise ValueError(f"method.assignment keep needs adapter.kind lora, not {kind}: use average or reinit")
        if "residual_rank" in options:
            raise ValueError(
                "method.assignment keep cannot be truncated by residual_rank: each client's base differs, and what is cut off would "
                "differ too; use average or reinit"
            )
        method, options = FedExKeep, {}
    if server and "optimizer" not in server:
        raise ValueError(f"method.server_{next(iter(server))} needs method.server_optimizer: avgm, adam or yogi")
    for option in ("beta2", "tau"):
        if server.get("optimizer") == "avgm" and option in server:
            raise ValueError(
                f"method.server_{option} belongs to server_optimizer adam and yogi, not to avgm: leave it out"
            )
    if server and not method.linear:
        means = ", ".join(name for name, m in METHODS.items() if m.linear)
        raise ValueError(
            f"method.server_optimizer steps along a mean, and {section.name} broadcasts none: use it with {means}"
        )
    if section.name == "fra-ffa" and options.get("split") == "balanced":
        raise ValueError(
            "method.split balanced does not fit fra-ffa: the A that it freezes needs orthonormal rows; leave it out"
        )
    if options.get("fra_rounds", 0) >= config.federation.rounds > 1:
        raise ValueError(
            f"method.fra_rounds {options['fra_rounds']} leaves no round with A frozen out of {config.federation.rounds}: lower it, or use fra"
        )
    if section.name == "fra-ffa":
        options.setdefault("fra_rounds", max(1, config.federation.rounds // 2))
    if server:
        options["server"] = ServerOptimizer(server.pop("optimizer"), **server)
    return method(**options)


def make_spec(config: Config, layers: Sequence[Layer], clients: Sequence[str]) -> Spec:
    """What methods must know of the model, with each client's rank. Raises ConfigError when ranks and clients do not fit."""
    return Spec(make_adapter(config.adapter), tuple(layers), config.seed, config.adapter.ranks(clients))


# --- reading --------------------------------------------------------------------------------------------------


def nearest(word: str, known) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def known_keys() -> list[str]:
    """All dotted keys of a config."""
    return [key for key, _, _ in help_lines()]


def _unknown(key: str) -> ConfigError:
    return ConfigError(f"unknown key '{key}'{nearest(key, known_keys())}")


def _sentence(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if path.startswith("adapter.rank."):  # the rest names a branch of its union
        path = "adapter.rank"
    if first["type"] == "extra_forbidden":
        return _unknown(path)
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(f"{path}: {message[0].lower()}{message[1:]}, not {first['input']!r}" if path else message)


def from_dict(values: dict[str, Any]) -> Config:
    """A config from nested plain values. Raises ConfigError."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _sentence(error) from None


def read_file(path: str) -> dict[str, Any]:
    """A YAML config as nested plain values. Raises ConfigError when it is missing or not a mapping."""
    if not Path(path).is_file():
        raise ConfigError(f"config file '{path}' does not exist")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file '{path}' is not YAML: {' '.join(str(error).split())}") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"config file '{path}' must hold sections such as 'model:' and 'data:'")
    return values or {}


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for name, value in over.items():
        merged[name] = (
            _merge(merged[name], value) if isinstance(value, dict) and isinstance(merged.get(name), dict) else value
        )
    return merged


def read_config(argv: list[str]) -> Config:
    """The config that `[--config F.yaml] [--section.key value ...]` means; flags win over the file.

    `--flag=value` and a lone `--flag` (true) are read too; `null` unsets. Raises ConfigError with one sentence that names the fix.
    """
    values: dict[str, Any] = {}
    given: dict[str, Any] = {}
    for key, value in argv_flags(argv):
        if key == "config":
            values = _merge(values, read_file(value))
            continue
        # A client's name may hold dots itself; its keys do not.
        client = re.fullmatch(r"clients\.(.+)\.(\w+)", key)
        path = ["clients", client[1], client[2]] if client else key.split(".")
        if not client and key not in known_keys():
            raise _unknown(key)
        nested: Any = None if value in ("null", "none", "None") else value
        for part in reversed(path):
            nested = {part: nested}
        given = _merge(given, nested)
    return from_dict(_merge(values, given))


def help_lines(model: type[BaseModel] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, doc) of every key, for `--help` and for the documentation."""
    lines = []
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            lines += help_lines(info.annotation, f"{prefix}{name}.")
        elif name == "clients" and model is Config:
            lines += [(f"clients.NAME.{k}", d, doc) for k, d, doc in help_lines(ClientSection)]
        else:
            lines.append((prefix + name, "" if info.default is None else str(info.default), info.description or ""))
    return lines
