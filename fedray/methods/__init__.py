"""Methods: how many clients' updates become one. One file a family; this is their register."""

from __future__ import annotations

from fedray.methods.base import Method
from fedray.methods.fed_sb import FedSB, RavanMean
from fedray.methods.fedask import FedASK
from fedray.methods.fedex import FedEx, FedExKeep
from fedray.methods.fedit import FedIT
from fedray.methods.fedrpca import FedRPCA
from fedray.methods.fedsa import FedSA
from fedray.methods.fedsvd import FedSVD
from fedray.methods.ffa import FFA
from fedray.methods.flora import FLoRA
from fedray.methods.fra import FRA, FRAFFA, FlexLoRA, FLoRIST
from fedray.methods.hetlora import HetLoRA
from fedray.methods.lora_fair import LoRAFair
from fedray.methods.rolora import RoLoRA
from fedray.methods.server import ServerOptimizer
from fedray.methods.state import Broadcast, Diagnostics, Increment, Spec, State, Update, View

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        FedIT,
        FFA,
        RoLoRA,
        FedSVD,
        FedEx,
        FLoRA,
        FRA,
        FRAFFA,
        FedSB,
        RavanMean,
        FedSA,
        FlexLoRA,
        HetLoRA,
        FLoRIST,
        FedASK,
        LoRAFair,
        FedRPCA,
    )
}


def why_not(method: str, adapter: str) -> str | None:
    """The reason why a method is not sound with an adapter, and what to use; None when it is. Both are known names."""
    fits = METHODS[method].adapters
    if adapter in fits:
        return None
    if method == "fed-sb":
        return f"it averages the r x r core R between two frozen bases, and {adapter} has no such core; it needs adapter.kind lora-sb, or use fedex or ffa"
    if method == "ravan":
        return (
            f"it averages the scaled cores of several frozen bases, and {adapter} has none; it needs adapter.kind ravan"
        )
    if adapter == "lora-sb":
        return "only its core trains, and the plain mean of that is exact: use fed-sb"
    if adapter == "ravan":
        return "only its cores train, and the plain mean of those is exact: use ravan, or fed-sb with the scales held"
    if METHODS[method].mixed_ranks:
        return f"cutting {adapter}'s factors to a client's rank has no meaning: it needs adapter.kind lora, or use fra"
    return f"the loss that it reports bounds s B A from sketches, which says nothing of {adapter}'s product: it needs adapter.kind lora, or use fra"


__all__ = [
    "METHODS",
    "Broadcast",
    "Diagnostics",
    "FedEx",
    "FedExKeep",
    "Increment",
    "Method",
    "ServerOptimizer",
    "Spec",
    "State",
    "Update",
    "View",
    "why_not",
]
