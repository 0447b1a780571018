"""Who holds which examples. Deterministic in the config, so every worker and the coordinator compute the same split;
where clients are kept to their own nodes, each process reads only what it may."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from fedray.config.sections import BUILTIN, DEFAULT_CLIENTS, Config
from fedray.data.columns import require_column, text_column
from fedray.data.dealing import deal_by_chance
from fedray.data.sources import load_held_out, load_splits
from fedray.data.tasks import TASKS
from fedray.errors import ConfigError, nearest
from fedray.seeding import derive


@dataclass(frozen=True)
class FederatedData:
    """All clients, in the run's order; the examples of those that are read here; and the coordinator's held-out
    examples.

    `held_out`: what each client keeps for its own evaluation (empty when not asked). `group`: the column of `test` by
    which metrics are also reported. `classes`: the label values, in order of their index (classification).
    """

    clients: list[str]
    train: dict[str, Dataset]
    held_out: dict[str, Dataset]
    test: Dataset
    text: str
    group: str | None
    classes: tuple[Any, ...]


def load_data(config: Config, reads: Sequence[str] = ()) -> FederatedData:
    """Read the source and deal it out. `reads`: the clients whose data may be read here, where clients are kept to
    their own nodes; columns and classes then come from the held-out examples alone.

    Raises ConfigError for whatever is missing or does not fit.
    """
    sources = {name: c.source for name, c in config.clients.items() if c.source is not None}
    if sources:
        clients, (train, test) = list(sources), _read_own(config, sources, reads)
    else:
        examples, test = _dealt_out(config)
        train = _deal(config, examples)
        clients = list(train)
    _check_names(config, clients)
    text = text_column(config.data.text, test if config.siloed else next(iter(train.values())))
    for where, part in [*((f"client '{name}'", part) for name, part in train.items()), ("the held-out data", test)]:
        _check(config, part, text, where)
    classes = _classes(config, train, test)
    if config.data.test_limit is not None:
        test = _draw_held_out(config, test, text)
    train, held_out = _keep_some(config, train)
    return FederatedData(clients, train, held_out, test, text, _group(config, test), classes)


def _check_names(config: Config, clients: Sequence[str]) -> None:
    """Whoever the config has settings for is a client."""
    for name in config.clients:
        if name not in clients:
            raise ConfigError(f"clients.{name} is not a client of this run{nearest(name, clients)}")


def _group(config: Config, test: Dataset) -> str | None:
    """The column by which metrics are also reported, if the held-out examples have it."""
    group = "package" if config.data.source == BUILTIN else config.data.column
    return group if group in test.column_names else None


def _read_own(config: Config, sources: Mapping[str, str], reads: Sequence[str]) -> tuple[dict[str, Dataset], Dataset]:
    """(training examples of the clients that are read here, held-out examples) where each client has a source of its
    own."""
    names = [name for name in sources if not config.siloed or name in reads]
    train = {name: load_splits(config.data, sources[name])[0] for name in names}
    # The coordinator's held-out examples come from data.source; a client's own test split stays with the client.
    split = config.data.test_split if config.data.evaluate_on == "test" else config.data.validation_split
    test = load_held_out(config.data, split)
    if test is None:
        raise ConfigError(
            f"clients have their own sources: give data.source, a folder or hub id with a {split} split, "
            "for the evaluation"
        )
    return train, test


def client_names(config: Config) -> list[str]:
    """`load_data(config).clients`, from as little data as names need: none, unless clients are the values of a column.
    Checks nothing. Raises ConfigError for a source or a column that is not there."""
    if with_sources := [name for name, client in config.clients.items() if client.source is not None]:
        return with_sources
    column = _client_column(config)
    if column is None:
        return _numbered(config.federation.clients or DEFAULT_CLIENTS)
    examples = _dealt_out(config)[0]
    return sorted(map(str, examples.unique(require_column(examples, column, "data.column"))))


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
    data = config.data
    everything, test = load_splits(data)
    if test is None:
        everything, test = _hold_out(config, everything, "held-out")
    if data.evaluate_on == "validation":
        validation = load_held_out(data, data.validation_split)
        if validation is None:
            everything, test = _hold_out(config, everything, "validation")
        else:
            test = validation
    if data.limit is not None:
        everything = _draw(everything, data.limit, config.seed, "limit")
    return everything, test


def _keep_some(config: Config, train: dict[str, Dataset]) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """(what each client trains on, what it keeps for its own evaluation); nothing is kept where
    `data.client_held_out` is 0."""
    if config.data.client_held_out == 0:
        return train, {}
    rest, held_out = {}, {}
    for name, examples in train.items():
        if len(examples) < 2:
            raise ConfigError(
                f"client '{name}' has {len(examples)} example: too few for data.client_held_out; set it to 0"
            )
        seed = derive(config.seed, "client-held-out", name) % 2**32
        halves = examples.train_test_split(
            test_size=max(1, round(config.data.client_held_out * len(examples))), seed=seed
        )
        rest[name], held_out[name] = halves["train"], halves["test"]
    return rest, held_out


def _hold_out(config: Config, examples: Dataset, purpose: str) -> tuple[Dataset, Dataset]:
    """(the rest, what is held out): the same for every seed, so that no seed trains on what another is measured by."""
    if len(examples) < 2:
        raise ConfigError(f"data source '{config.data.source}' holds {len(examples)} example: too few to hold some out")
    halves = examples.train_test_split(test_size=config.data.held_out, seed=derive(purpose) % 2**32)
    return halves["train"], halves["test"]


def public_data(config: Config, data: FederatedData) -> Dataset:
    """The examples of `adapter.subspace_source`, with the columns that the task reads. Raises ConfigError where it
    does not fit, ValueError where the config names none."""
    source = config.adapter.subspace_source
    if source is None:
        raise ValueError("adapter.subspace_source is not given")
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


def _draw_held_out(config: Config, test: Dataset, text: str) -> Dataset:
    """`data.test_limit` of the held-out examples; where a task takes the rows of one question as one, of the
    questions."""
    limit = config.data.test_limit or len(test)
    questions = TASKS[config.model.task].questions(config.data, test, text)
    if questions is None:
        return _draw(test, limit, config.seed, "test")
    each = Dataset.from_dict({"question": list(dict.fromkeys(questions))})
    drawn = set(_draw(each, limit, config.seed, "test")["question"])
    return test.select([i for i, question in enumerate(questions) if question in drawn])


def _deal(config: Config, examples: Dataset) -> dict[str, Dataset]:
    column = _client_column(config)
    if column is not None:
        return _deal_by_column(config, examples, column)
    parts = deal_by_chance(config, examples)
    return dict(zip(_numbered(len(parts)), parts, strict=True))


def _deal_by_column(config: Config, examples: Dataset, column: str) -> dict[str, Dataset]:
    """A client for each value of the column, sorted."""
    # Imported here: it brings plotting libraries, which every worker would wait for.
    from flwr_datasets.partitioner import NaturalIdPartitioner

    require_column(examples, column, "data.column")
    if examples.data.column(column).null_count:
        raise ConfigError(f"data.column '{column}' has rows without a value: fill them in or leave them out")
    partitioner = NaturalIdPartitioner(partition_by=column)
    partitioner.dataset = examples
    with redirect_stderr(io.StringIO()):  # a progress bar that nothing switches off
        count = partitioner.num_partitions
        parts = [partitioner.load_partition(i) for i in range(count)]
    named = {str(partitioner.partition_id_to_natural_id[i]): part for i, part in enumerate(parts)}
    clients = config.federation.clients
    if clients not in (None, count):
        raise ConfigError(
            f"federation.clients is {clients}, but column '{column}' has {count} values: leave federation.clients out"
        )
    return {name: named[name] for name in sorted(named)}


def _check(config: Config, part: Dataset, text: str, where: str) -> None:
    """Every column that the task reads is there and holds values."""
    columns = {"data.text": text} | TASKS[config.model.task].columns(config.data)
    for key, column in columns.items():
        if part.data.column(require_column(part, column, key)).null_count:
            raise ConfigError(f"{key} '{column}' has rows without a value in {where}: fill them in or leave them out")
    if not any(len(str(value)) > 1 for value in part[text]):
        raise ConfigError(f"data.text '{text}' holds no text in {where}")


def _classes(config: Config, train: dict[str, Dataset], test: Dataset) -> tuple[Any, ...]:
    """The label values of the training data, sorted. Raises ConfigError for held-out labels that are not among them."""
    if not TASKS[config.model.task].labelled:
        return ()
    label = config.data.label
    if config.siloed:
        values = set(test.unique(label))
        _check_silos(config, train, values)
    else:
        values = {value for part in train.values() for value in part.unique(label)}
    if len(values) < 2:
        raise ConfigError(f"data.label '{label}' holds {len(values)} class: classification needs at least two")
    if strange := set(test.unique(label)) - values:
        raise ConfigError(
            f"data.label '{label}' of the held-out data holds {sorted(map(repr, strange))[0]}, which no "
            "training example "
            f"has ({', '.join(sorted(map(repr, values)))}): give data.test_split a split with the same labels"
        )
    return tuple(sorted(values, key=lambda v: (str(type(v)), v)))


def _check_silos(config: Config, train: dict[str, Dataset], values: set[Any]) -> None:
    """No client that is read here has a label beyond those of the held-out data; a private client's is not named."""
    for name, part in train.items():
        if strange := set(part.unique(config.data.label)) - values:
            which = "a value" if config.privacy.on else f"the value {sorted(map(repr, strange))[0]}"
            raise ConfigError(
                f"data.label '{config.data.label}' of client '{name}' holds {which} that the held-out data have not: "
                "their classes are those of the run"
            )
