"""Options: fields of a method or an adapter that a config may set, declared where they are used.

`energy: float = option(0.99, "share of sum S_j^2 that a layer's rank keeps", gt=0, le=1)` is all that the config, its
`--help` and its refusals need to know of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from typing import Any, get_type_hints

_KEY = "option"


@dataclass(frozen=True)
class Option:
    """One declaration: the type that the config reads, the default, a doc without a full stop, and pydantic's bounds.

    `where`: what else must be set for the option to count, as `--help` words it. `bounds`: `gt`, `le` and the like.
    """

    type: Any
    default: Any
    doc: str
    where: str
    bounds: Mapping[str, Any]

    def line(self, owners: str) -> str:
        """The option's line of help, the names of those that have it first where there are any."""
        says_default = self.default not in (None, MISSING) and "default" not in self.doc
        value = f" (default {self.default:g})" if isinstance(self.default, float) else f" (default {self.default})"
        label = ", ".join(part for part in (owners, self.where) if part)
        return f"{label + ': ' if label else ''}{self.doc}{value if says_default else ''}."


def option(default: Any, doc: str, *, where: str = "", reads: Any = None, **bounds: Any) -> Any:
    """A dataclass field that a config may set; MISSING as default makes it required.

    `reads`: the type that the config reads, where that is wider than the field's. A subclass that declares a field
    of the same name without `option` takes the option away.
    """
    declared = {"doc": doc, "where": where, "reads": reads, "bounds": bounds}
    return dataclasses.field(default=default, metadata={_KEY: declared})


def options(owner: type) -> dict[str, Option]:
    """The options that a dataclass declares or inherits, in the order of its fields."""
    declarations, types = {}, get_type_hints(owner)
    for field in dataclasses.fields(owner):
        if declared := field.metadata.get(_KEY):
            reads = declared["reads"] or types[field.name]
            doc, where, bounds = declared["doc"], declared["where"], declared["bounds"]
            declarations[field.name] = Option(reads, field.default, doc, where, bounds)
    return declarations
