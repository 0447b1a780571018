"""Who holds which examples. Deterministic in the config, so every worker and the coordinator compute the same split; where clients are
kept to their own nodes, each process reads only what it is told to."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from fedray.config.sections import BUILTIN, DEFAULT_CLIENTS, Config
from fedray.data.sources import load_splits, require_column, text_column
from fedray.errors import ConfigError, nearest
from fedray.seeding import derive


@dataclass(frozen=True)
class FederatedData:
    """All clients, in the run's order; the examples of those that are read here; and the coordinator's held-out examples.

    `held_out`: what each client keeps for its own evaluation (empty when not asked). `group`: the column of `test` by which
    metrics are also reported. `classes`: the label values, in order of their index (classification).
    """

    clients: list[str]
    train: dict[str, Dataset]
    held_out: dict[str, Dataset]
    test: Dataset
    text: str
    group: str | None
    classes: tuple


def load_data(config: Config, reads: Sequence[str] = ()) -> FederatedData:
    """Read the source and deal it out. `reads`: the clients whose data may be read here, where clients are kept to their own nodes; columns
    and classes then come from the held-out examples alone. Raises ConfigError for whatever is missing or does not fit."""
    own = {name: c.source for name, c in config.clients.items() if c.source is not None}
    clients = list(own)
    if own:
        pairs = {
            name: load_splits(config.data, source) for name, source in own.items() if not config.siloed or name in reads
        }
        train = {name: pair[0] for name, pair in pairs.items()}
        # The coordinator's held-out examples come from data.source; a client's own test split stays with the client.
        split = config.data.test_split if config.data.evaluate_on == "test" else config.data.validation_split
        test = load_splits(config.data, split=split, trains=False)[1] if config.data.source != BUILTIN else None
        if test is None:
            raise ConfigError(
                f"clients have their own sources: give data.source, a folder or hub id with a {split} split, for the evaluation"
            )
    else:
        everything, test = _dealt_out(config)
        train = _deal(config, everything)
        clients = list(train)
    for name in config.clients:
        if name not in clients:
            raise ConfigError(f"clients.{name} is not a client of this run{nearest(name, clients)}")
    text = text_column(config, test if config.siloed else next(iter(train.values())))
    for where, part in [*((f"client '{name}'", part) for name, part in train.items()), ("the held-out data", test)]:
        _check(config, part, text, where)
    classes = _classes(config, train, test)
    if config.data.test_limit is not None:
        test = _draw(test, config.data.test_limit, config.seed, "test")
    held_out = {}
    if config.data.client_held_out > 0:
        for name, examples in train.items():
            if len(examples) < 2:
                raise ConfigError(
                    f"client '{name}' has {len(examples)} example: too few for data.client_held_out; set it to 0"
                )
            seed = derive(config.seed, "client-held-out", name) % 2**32
            halves = examples.train_test_split(
                test_size=max(1, round(config.data.client_held_out * len(examples))), seed=seed
            )
            train[name], held_out[name] = halves["train"], halves["test"]
    group = "package" if config.data.source == BUILTIN else config.data.column
    return FederatedData(clients, train, held_out, test, text, group if group in test.column_names else None, classes)


def client_names(config: Config) -> list[str]:
    """`load_data(config).clients`, from as little data as names need: none, unless clients are the values of a column.
    Checks nothing. Raises ConfigError for a source or a column that is not there."""
    if with_sources := [name for name, client in config.clients.items() if client.source is not None]:
        return with_sources
    by_column = _client_column(config)
    if by_column is None:
        return _numbered(config.federation.clients or DEFAULT_CLIENTS)
    examples = _dealt_out(config)[0]
    return sorted(map(str, examples.unique(require_column(examples, by_column, "data.column"))))


def _numbered(clients: int) -> list[str]:
    """The names of clients that have none by nature."""
    width = len(str(clients - 1))
    return [f"client-{i:0{width}d}" for i in range(clients)]


def _client_column(config: Config) -> str | None:
    """The column whose values are the clients; None where examples are dealt out by chance."""
    data = config.data
    return "package" if data.source == BUILTIN else data.column if data.partition == "column" else None


def _dealt_out(config: Config) -> tuple[Dataset, Dataset]:
    """(what is dealt out to the clients, what is held out of it) where all clients share one source."""
    everything, test = load_splits(config.data)
    if test is None:
        everything, test = _hold_out(config, everything, "held-out")
    if config.data.evaluate_on == "validation":
        validation = (
            None if config.data.source == BUILTIN else load_splits(config.data, split=config.data.validation_split)[1]
        )
        if validation is None:
            everything, test = _hold_out(config, everything, "validation")
        else:
            test = validation
    if config.data.limit is not None:
        everything = _draw(everything, config.data.limit, config.seed, "limit")
    return everything, test


def _hold_out(config: Config, examples: Dataset, purpose: str) -> tuple[Dataset, Dataset]:
    """(the rest, what is held out): the same for every seed, so that no seed trains on what another is measured by."""
    if len(examples) < 2:
        raise ConfigError(f"data source '{config.data.source}' holds {len(examples)} example: too few to hold some out")
    halves = examples.train_test_split(test_size=config.data.held_out, seed=derive(purpose) % 2**32)
    return halves["train"], halves["test"]


def public_data(config: Config, data: FederatedData) -> Dataset:
    """The examples of `adapter.subspace_source`, with the columns that the task reads. Raises ConfigError where it does not fit."""
    source = config.adapter.subspace_source
    section = config.data.model_copy(update={"subset": None}) if Path(source).exists() else config.data
    examples = load_splits(section, source)[0]
    _check(config, examples, data.text, f"adapter.subspace_source '{source}'")
    if data.classes and (strange := set(examples.unique(config.data.label)) - set(data.classes)):
        raise ConfigError(
            f"adapter.subspace_source '{source}' has the label {sorted(map(repr, strange))[0]}, which no client has"
        )
    return examples


def _draw(examples: Dataset, count: int, seed: int, purpose: str) -> Dataset:
    return examples.shuffle(seed=derive(seed, purpose) % 2**32).select(range(min(count, len(examples))))


def _deal(config: Config, examples: Dataset) -> dict[str, Dataset]:
    # Imported here: it brings plotting libraries, which every worker would wait for.
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner, NaturalIdPartitioner

    data, clients = config.data, config.federation.clients or DEFAULT_CLIENTS
    by_column = _client_column(config)
    if by_column is not None:
        require_column(examples, by_column, "data.column")
        if examples.data.column(by_column).null_count:
            raise ConfigError(f"data.column '{by_column}' has rows without a value: fill them in or leave them out")
        partitioner = NaturalIdPartitioner(partition_by=by_column)
        partitioner.dataset = examples
        with redirect_stderr(io.StringIO()):  # a progress bar that nothing switches off
            count = partitioner.num_partitions
            parts = [partitioner.load_partition(i) for i in range(count)]
        parts = {str(partitioner.partition_id_to_natural_id[i]): part for i, part in enumerate(parts)}
        parts = {name: parts[name] for name in sorted(parts)}
        if config.federation.clients not in (None, count):
            raise ConfigError(
                f"federation.clients is {clients}, but column '{by_column}' has {count} values: leave federation.clients out"
            )
        return parts
    if len(examples) < clients:
        raise ConfigError(
            f"{len(examples)} training examples are fewer than {clients} clients: lower federation.clients or give more data"
        )
    if data.partition == "iid":
        partitioner = IidPartitioner(num_partitions=clients)
        partitioner.dataset = examples.shuffle(seed=derive(config.seed, "partition") % 2**32)
    else:
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by=require_column(examples, data.label, "data.label"),
            alpha=data.alpha,
            min_partition_size=min(10, len(examples) // clients),
            seed=derive(config.seed, "partition") % 2**32,
        )
        partitioner.dataset = examples
    try:
        return {name: partitioner.load_partition(i) for i, name in enumerate(_numbered(clients))}
    except ValueError as error:
        raise ConfigError(
            f"data.alpha {data.alpha} leaves a client with too few examples: raise it, or lower federation.clients ({error})"
        ) from error


def _check(config: Config, part: Dataset, text: str, where: str) -> None:
    """Every column that the task reads is there and holds values."""
    data = config.data
    keys = {"data.text": text, "data.text_pair": data.text_pair, "data.completion": data.completion}
    if config.model.task == "classification":
        keys["data.label"] = data.label
    for key, column in keys.items():
        if column is not None and part.data.column(require_column(part, column, key)).null_count:
            raise ConfigError(f"{key} '{column}' has rows without a value in {where}: fill them in or leave them out")
    if not any(len(str(value)) > 1 for value in part[text]):
        raise ConfigError(f"data.text '{text}' holds no text in {where}")


def _classes(config: Config, train: dict[str, Dataset], test: Dataset) -> tuple:
    """The label values of the training data, sorted. Raises ConfigError for held-out labels that are not among them."""
    if config.model.task != "classification":
        return ()
    label = config.data.label
    values = (
        set(test.unique(label)) if config.siloed else {value for part in train.values() for value in part.unique(label)}
    )
    if config.siloed:
        for name, part in train.items():
            if strange := set(part.unique(label)) - values:
                which = "a value" if config.privacy.on else f"the value {sorted(map(repr, strange))[0]}"
                raise ConfigError(
                    f"data.label '{label}' of client '{name}' holds {which} that the held-out data have not: their classes are those of the run"
                )
    if len(values) < 2:
        raise ConfigError(f"data.label '{label}' holds {len(values)} class: classification needs at least two")
    if strange := set(test.unique(label)) - values:
        raise ConfigError(
            f"data.label '{label}' of the held-out data holds {sorted(map(repr, strange))[0]}, which no training example has "
            f"({', '.join(sorted(map(repr, values)))}): give data.test_split a split with the same labels"
        )
    return tuple(sorted(values, key=lambda v: (str(type(v)), v)))
