"""Numbers as integers modulo 2^64, whose sums are exact."""

from __future__ import annotations

import numpy as np

from fedray.errors import PrivacyError

#: Bits after the point: a number is rounded to a multiple of 2^-32 before it is masked.
FRACTION = 32
STEP = 2.0**-FRACTION


def encode(values: np.ndarray, members: int) -> np.ndarray:
    """fp64 -> uint64, to the nearest multiple of STEP, negative numbers in two's complement. Raises PrivacyError for
    values whose sum over so many members could wrap around, or that are not finite."""
    limit = 2.0 ** (63 - FRACTION) / members
    if not np.isfinite(values).all() or (np.abs(values) >= limit).any():
        raise PrivacyError(
            f"a number to be summed securely is not below {limit:.3g} in size (times the client's weight): "
            "lower federation.lr, or use method.weights equal"
        )
    return np.rint(values * 2.0**FRACTION).astype(np.int64).view(np.uint64)


def decode(total: np.ndarray) -> np.ndarray:
    """uint64 -> fp64. Each member's number was off by STEP / 2 at most."""
    return total.view(np.int64).astype(np.float64) * STEP
