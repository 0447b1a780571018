"""Shamir's shares (1979): points of a polynomial over the integers modulo a Mersenne prime."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

from fedray.errors import PrivacyError
from fedray.privacy.keys import Stream

PRIME = 2**521 - 1
SHARE_BYTES = 66


def split(secret: bytes, points: Iterable[int], threshold: int, stream: Stream) -> dict[int, int]:
    """The shares of a secret of 32 bytes at these points (from 1): any `threshold` of them give the secret, fewer
    nothing. A share follows from `stream` and its own point, whatever the other points are."""
    polynomial = [int.from_bytes(secret, "big")]
    # 640 bits each: as good as uniform below 2^521.
    polynomial.extend(int.from_bytes(stream.integers(10).tobytes(), "big") % PRIME for _ in range(threshold - 1))
    return {x: _value(polynomial, x) for x in points}


def _value(polynomial: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(polynomial):
        value = (value * x + coefficient) % PRIME
    return value


def join(shares: Mapping[int, int]) -> bytes:
    """The 32 bytes that shares by their points mean. Raises PrivacyError where they mean no 32 bytes."""
    secret = sum(y * weight for y, weight in zip(shares.values(), _weights(tuple(shares)), strict=True)) % PRIME
    if secret >= 1 << 256:
        raise PrivacyError("the shares of a secret do not fit together: too few, or changed on the way")
    return secret.to_bytes(32, "big")


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """What each point's share counts with in the value at 0 (Lagrange)."""
    found = []
    for x in points:
        above = below = 1
        for other in points:
            if other != x:
                above, below = above * -other % PRIME, below * (x - other) % PRIME
        found.append(above * pow(below, -1, PRIME) % PRIME)
    return tuple(found)
