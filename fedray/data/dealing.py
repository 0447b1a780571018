"""How examples are dealt to clients by chance: alike, or each with its own share of the labels or of the examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from datasets import Dataset

from fedray.config.sections import DEFAULT_CLIENTS, Config
from fedray.data.columns import require_column
from fedray.errors import ConfigError
from fedray.seeding import derive

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def deal_by_chance(config: Config, examples: Dataset) -> list[Dataset]:
    """The examples of each of `federation.clients` clients, drawn by the seed. Raises ConfigError where there are too
    few, or a client would have none."""
    data, clients = config.data, config.federation.clients or DEFAULT_CLIENTS
    if len(examples) < clients:
        raise ConfigError(
            f"{len(examples)} training examples are fewer than {clients} clients: "
            "lower federation.clients or give more data"
        )
    try:
        return _DEALERS[data.partition](config, examples, clients)
    except ValueError as error:
        raise ConfigError(
            f"data.partition {data.partition} leaves a client with too few examples: lower federation.clients, or "
            f"change {_KNOBS[data.partition]} ({' '.join(str(error).split())})"
        ) from error


def _seed(config: Config) -> int:
    return derive(config.seed, "partition") % 2**32


def _label(config: Config, examples: Dataset) -> str:
    """The column of the labels. Raises ConfigError where some row has none, or a list."""
    label = require_column(examples, config.data.label, "data.label")
    column = examples.data.column(label)
    if column.null_count or pa.types.is_nested(column.type):
        raise ConfigError(f"data.label '{label}' has rows without a single value: fill them in or leave them out")
    return label


def _parts(partitioner: Partitioner, examples: Dataset, clients: int) -> list[Dataset]:
    """What a partitioner of Flower Datasets makes of them."""
    partitioner.dataset = examples
    return [partitioner.load_partition(i) for i in range(clients)]


def _iid(config: Config, examples: Dataset, clients: int) -> list[Dataset]:
    # Imported here, and below: it brings plotting libraries, which every worker would wait for.
    from flwr_datasets.partitioner import IidPartitioner

    return _parts(IidPartitioner(num_partitions=clients), examples.shuffle(seed=_seed(config)), clients)


def _dirichlet(config: Config, examples: Dataset, clients: int) -> list[Dataset]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        num_partitions=clients,
        partition_by=_label(config, examples),
        alpha=config.data.alpha,
        min_partition_size=min(10, len(examples) // clients),
        seed=_seed(config),
    )
    return _parts(partitioner, examples, clients)


def _pathological(config: Config, examples: Dataset, clients: int) -> list[Dataset]:
    from flwr_datasets.partitioner import PathologicalPartitioner

    label, each = _label(config, examples), config.data.labels_per_client
    if each > (there := len(examples.unique(label))):
        raise ConfigError(f"data.labels_per_client {each} is more than the {there} labels there are: lower it")
    if clients + each - 1 < there:  # client i has label i and those after it
        raise ConfigError(
            f"data.labels_per_client {each} of {clients} clients leave out some of the {there} labels: raise one"
        )
    partitioner = PathologicalPartitioner(
        num_partitions=clients,
        partition_by=label,
        num_classes_per_partition=each,
        class_assignment_mode="deterministic",
        seed=_seed(config),
    )
    return _parts(partitioner, examples, clients)


def _shards(config: Config, examples: Dataset, clients: int) -> list[Dataset]:
    """In order of their labels the examples are cut into shards of one size, to one, and each client is dealt some
    (McMahan et al., AISTATS 2017)."""
    each, generator = config.data.shards_per_client, np.random.default_rng(_seed(config))
    if clients * each > len(examples):
        raise ConfigError(
            f"data.shards_per_client {each} of {clients} clients are more than {len(examples)} examples: lower it"
        )
    mixed = generator.permutation(len(examples))
    labels = np.unique(np.asarray(examples[_label(config, examples)], dtype=str), return_inverse=True)[1]
    shards = np.array_split(mixed[np.argsort(labels[mixed], kind="stable")], clients * each)
    deal = generator.permutation(clients * each).reshape(clients, each)
    return [examples.select(np.concatenate([shards[i] for i in mine])) for mine in deal]


def _quantity(config: Config, examples: Dataset, clients: int) -> list[Dataset]:
    """Of all examples one client has so many, another so few: shares from a Dirichlet distribution, one example at
    least."""
    shares = np.random.default_rng(_seed(config)).dirichlet([config.data.alpha] * clients)
    sizes = 1 + np.floor(shares * (len(examples) - clients)).astype(int)
    sizes[: len(examples) - sizes.sum()] += 1  # what rounding down has left over
    ends = np.cumsum(sizes)
    mixed = examples.shuffle(seed=_seed(config))
    return [mixed.select(range(int(end - size), int(end))) for size, end in zip(sizes, ends, strict=True)]


_DEALERS: dict[str, Callable[[Config, Dataset, int], list[Dataset]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
    "shards": _shards,
    "quantity": _quantity,
}
#: What changes how uneven each of them is.
_KNOBS = {
    "iid": "nothing",
    "dirichlet": "data.alpha",
    "pathological": "data.labels_per_client",
    "shards": "data.shards_per_client",
    "quantity": "data.alpha",
}
