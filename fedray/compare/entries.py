"""One line of a comparison, or one value of a sweep's `entry`: an adapter, a method and perhaps a rank."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedray.errors import ConfigError
from fedray.methods import METHODS

#: What an entry's own options may set, and of that what is one for all entries.
_SETTABLE = ("adapter.", "method.", "federation.proximal")
_SHARED = ("adapter.kind", "method.name", "method.weights")


@dataclass(frozen=True)
class Entry:
    """`[ADAPTER+]METHOD[@RANK]`. An adapter that is not named is the config's own where it fits the method, else the
    method's first."""

    text: str
    adapter: str
    method: str
    rank: int | None

    @staticmethod
    def parse(text: str, adapter: str | None) -> Entry:
        """`adapter`: the one that the config names. Raises ConfigError for anything else."""
        match = re.fullmatch(r"(?:([\w-]+)\+)?([\w-]+)(?:@(\d+))?", text)
        if not match or match[2] not in METHODS:
            raise ConfigError(
                f"--methods '{text}' is not known: write [ADAPTER+]METHOD[@RANK] with a method of {', '.join(METHODS)}"
            )
        fits = METHODS[match[2]].adapters
        default = adapter if adapter is not None and adapter in fits else fits[0]
        return Entry(text, match[1] or default, match[2], int(match[3]) if match[3] else None)

    @property
    def keys(self) -> dict[str, Any]:
        """The config keys that it stands for."""
        rank = {} if self.rank is None else {"adapter.rank": self.rank}
        return {"method.name": self.method, "adapter.kind": self.adapter} | rank

    def flags(self, flags: Mapping[str, str]) -> list[str]:
        """The words that a run of this entry is given. `flags`: the comparison's own, among them perhaps this entry's
        options. Raises ConfigError for options that are none, or that are one for all entries."""
        keys = [(key, str(value)) for key, value in self.keys.items()] + self._options(
            flags.get(f"set.{self.text}", "")
        )
        return [word for key, value in keys for word in (f"--{key}", value)]

    def _options(self, text: str) -> list[tuple[str, str]]:
        """`key=value,key=value`, where a value may hold commas itself."""
        options = []
        for part in filter(None, re.split(r",(?=[\w.]+=)", text)):
            key, equals, value = part.partition("=")
            if not equals:
                raise ConfigError(f"--set.{self.text} '{key}' is no setting: write key=value,key=value")
            if not key.startswith(_SETTABLE) or key in _SHARED:
                raise ConfigError(
                    f"--set.{self.text} may set keys of adapter and method, and not '{key}': it is one for all entries"
                )
            options.append((key, value))
        return options
