"""Methods: how many clients' updates become one. One file a family; this is their register."""

from __future__ import annotations

from fedray.adapters import ADAPTERS
from fedray.methods.base import Method
from fedray.methods.fedex import FedEx, FedExKeep
from fedray.methods.robust import RobustOptions, RobustRule
from fedray.methods.server import ServerOptimizer
from fedray.methods.state import Broadcast, Diagnostics, Increment, Spec, State, Update, View
from fedray.registers import load

#: Module and class of each method, in the order in which tables show them. A new one is its file and a line here.
_CLASSES = (
    "fedit.FedIT",
    "ffa.FFA",
    "rolora.RoLoRA",
    "fedsvd.FedSVD",
    "fedex.FedEx",
    "flora.FLoRA",
    "fra.FRA",
    "fra.FRAFFA",
    "fed_sb.FedSB",
    "fed_sb.RavanMean",
    "fedsa.FedSA",
    "fra.FlexLoRA",
    "hetlora.HetLoRA",
    "raflora.RaFLoRA",
    "fra.FLoRIST",
    "fedask.FedASK",
    "lora_fair.LoRAFair",
    "fedrpca.FedRPCA",
    "fedrot.FedRot",
)

METHODS: dict[str, type[Method]] = {method.name: method for method in load(__name__, _CLASSES)}


def why_not(method: str, adapter: str) -> str | None:
    """The reason why a method is not sound with an adapter, and what to use; None when it is. Both are known names."""
    return METHODS[method].why_not(ADAPTERS[adapter])


def linear_methods() -> str:
    """The names of those whose aggregate is a mean, for a sentence."""
    return ", ".join(name for name, method in METHODS.items() if method.linear)


__all__ = [
    "METHODS",
    "Broadcast",
    "Diagnostics",
    "FedEx",
    "FedExKeep",
    "Increment",
    "Method",
    "RobustOptions",
    "RobustRule",
    "ServerOptimizer",
    "Spec",
    "State",
    "Update",
    "View",
    "linear_methods",
    "why_not",
]
