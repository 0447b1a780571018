"""FLoRA (Wang et al., NeurIPS 2024, arXiv 2409.05976): the clients' factors stacked, merged into the base, and
fresh factors every round.

The same map as FedEx with `assignment: reinit`, under its own name; clients may have different ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fedray.methods.fedex import FedEx


@dataclass(frozen=True)
class FLoRA(FedEx):
    """W0 <- W0 + s [B_1 ... B_k] [p_1 A_1; ...; p_k A_k]; A fresh, B zero. Sends r_i (m + n) up and sum r_j (m + n)
    down."""

    name = "flora"
    exact = "yes"
    linear = False
    kept = ()
    mixed_ranks = True
    assignment: Literal["reinit"] = "reinit"
