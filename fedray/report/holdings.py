"""Who holds what before a run: rows and labels of each client, as a table and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from fedray.errors import ConfigError

if TYPE_CHECKING:
    from fedray.config.sections import Config

#: Labels that are told apart; the others are one column.
LABELS = 10
#: Clients that a table shows, and a picture; beyond, those with the fewest and the most rows.
ROWS, BARS = 40, 60


@dataclass(frozen=True)
class Holdings:
    """By client, how many rows it has of each label; under "" where there are no labels. `labels`: the commonest
    first."""

    rows: Mapping[str, Mapping[str, int]]
    labels: tuple[str, ...]

    def size(self, client: str) -> int:
        """All rows of a client."""
        return sum(self.rows[client].values())

    def shown(self, most: int) -> list[str]:
        """At most so many clients, the largest first: all of them, or half from either end."""
        order = sorted(self.rows, key=lambda client: (-self.size(client), client))
        return order if len(order) <= most else [*order[: most // 2], *order[-(most - most // 2) :]]


def holdings(config: Config) -> Holdings:
    """What the config deals to each client, as a run would. Raises ConfigError as `load_data` does, and where clients'
    data are read on their own nodes alone. O(rows)."""
    from fedray.data.partition import load_data

    if config.siloed:
        raise ConfigError("clients are kept to their own nodes: who holds what is not known here")
    data = load_data(config)
    first = next(iter(data.train.values()))
    label = config.data.label if config.data.label in first.column_names else None
    counts = {
        client: Counter(map(str, part[label]) if label else {"": len(part)}) for client, part in data.train.items()
    }
    every: Counter[str] = sum(counts.values(), Counter())
    common = tuple(name for name, _ in every.most_common(LABELS))
    return Holdings({client: _folded(count, common) for client, count in counts.items()}, common)


def _folded(count: Mapping[str, int], common: tuple[str, ...]) -> dict[str, int]:
    """With the labels that are not told apart as one."""
    kept = {name: count.get(name, 0) for name in common}
    rest = sum(count.values()) - sum(kept.values())
    return kept | ({"others": rest} if rest else {})


def table_of(found: Holdings) -> Table:
    """A line a client: rows, its share of all, and rows of each label."""
    total = sum(found.size(client) for client in found.rows)
    labels = [name for name in _columns(found) if name]
    shown = Table(title=f"{len(found.rows)} clients, {total:,} rows", title_justify="left")
    # On a narrow terminal the numbers give way: a client is known by its name.
    shown.add_column("client", no_wrap=True, min_width=min(24, max(map(len, found.rows))))
    for column in ("rows", "share", *labels):
        shown.add_column(column[:24], justify="right")
    clients = found.shown(ROWS)
    for i, client in enumerate(clients):
        if len(clients) < len(found.rows) and i == ROWS // 2:
            shown.add_row("...")
        size = found.size(client)
        each = [f"{found.rows[client].get(name, 0):,}" for name in labels]
        shown.add_row(client, f"{size:,}", f"{size / total:.1%}", *each)
    return shown


def _columns(found: Holdings) -> list[str]:
    others = any("others" in row for row in found.rows.values())
    return [*found.labels, *(["others"] if others else [])]


def picture_of(found: Holdings) -> Any:
    """A matplotlib figure: a bar a client, in it the rows of each label."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    clients = found.shown(BARS)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(clients)), layout="constrained")
    left = [0] * len(clients)
    for i, name in enumerate(_columns(found)):
        widths = [found.rows[client].get(name, 0) for client in clients]
        axes.barh(range(len(clients)), widths, left=left, color=f"C{i}", label=name[:24] or "rows")
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(clients)), [client[:24] for client in clients])
    axes.invert_yaxis()
    axes.set_xlabel("training rows")
    few = "" if len(clients) == len(found.rows) else f" (the {len(clients)} largest and smallest)"
    axes.set_title(f"Who holds what: {len(found.rows)} clients{few}", loc="left")
    if any(found.labels):
        axes.legend(title="label", fontsize="small", loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def write_picture(found: Holdings, file: str) -> Path:
    """The picture, as a file of the kind that its name ends in. Raises ConfigError where it cannot be written."""
    from matplotlib import pyplot

    figure, path = picture_of(found), Path(file)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out '{file}' cannot be written: {error}") from error
    finally:
        pyplot.close(figure)
    return path
