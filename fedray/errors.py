"""What fedray raises towards a person. Each carries one sentence that names the cause and the fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedrayError(Exception):
    """Base of all; `exit_code` is what the command line returns for it."""

    exit_code = 1


class ConfigError(FedrayError):
    """The input cannot be run: found before anything is touched."""

    exit_code = 2


class ClientError(FedrayError):
    """A client's local work raised: carries the client's name and the cause."""

    def __init__(self, client: str, cause: str, details: str = ""):
        super().__init__(f"client '{client}' failed: {cause}")
        self.client, self.cause, self.details = client, cause, details

    def __reduce__(self) -> tuple[type[ClientError], tuple[str, str, str]]:
        return ClientError, (self.client, self.cause, self.details)


class RoundError(FedrayError):
    """A round could not reach its quorum, or the aggregate is not finite. `details`: what failed clients said."""

    def __init__(self, sentence: str, details: str = ""):
        super().__init__(sentence)
        self.details = details


class LostError(FedrayError):
    """What a client sent is gone with the node that held it."""


class RankError(FedrayError):
    """Another rank of a client's worker failed: what it said."""


class PrivacyError(FedrayError):
    """A guarantee could not be kept: nothing was released that was not accounted for. The sentence says nothing about
    any example."""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: what was probably meant, or all that is known."""
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    return f": did you mean {close[0]}?" if close else f"; known are {', '.join(names)}"
