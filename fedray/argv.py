"""How a command's words are read, in one place: `--flag value`, `--flag=value`, and a lone `--flag`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

from fedray.errors import ConfigError


def words(argv: Sequence[str]) -> list[str]:
    """The words with every `--flag=value` as two of them."""
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--") else [word])]


def flags(argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, value) of flags alone, in order; a flag without a value is `true`. Raises ConfigError for any other
    word."""
    queue = deque(words(argv))
    while queue:
        word = queue.popleft()
        if not word.startswith("--"):
            raise ConfigError(f"'{word}' is not a flag: write --section.key value")
        yield word[2:], queue.popleft() if queue and not queue[0].startswith("--") else "true"


def split(
    argv: Sequence[str], takes: Callable[[str], bool], switches: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """A command's own flags (those whose name it `takes`, and `switches`, which have no value and become `true`), and
    all other words in order. Raises ConfigError for an own flag without its value."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    queue = deque(words(argv))
    while queue:
        word = queue.popleft()
        name = word.removeprefix("--")
        if name == word or not (name in switches or takes(name)):
            rest.append(word)
        elif name in switches:
            taken[name] = "true"
        elif queue:
            taken[name] = queue.popleft()
        else:
            raise ConfigError(f"{word} needs a value")
    return taken, rest
