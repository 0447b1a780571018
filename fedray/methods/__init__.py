"""Methods: how many clients' updates become one. One file a family; this is their register."""

from fedray.methods.base import (
    Broadcast,
    Diagnostics,
    Increment,
    Method,
    Payload,
    Spec,
    State,
    Update,
    View,
)
from fedray.methods.fedex import FedEx, FedExKeep
from fedray.methods.fedit import FedIT
from fedray.methods.ffa import FFA
from fedray.methods.flora import FLoRA
from fedray.methods.fra import FRA, FRAFFA

METHODS: dict[str, type[Method]] = {method.name: method for method in (FedIT, FFA, FedEx, FRA, FRAFFA, FLoRA)}

#: Methods of the field that only make sense with an adapter of their own: name -> (adapter, reason).
NEEDS_ADAPTER = {
    "fed-sb": ("lora-sb", "it averages the r x r core R between two frozen bases, and lora has no such core"),
    "ravan": ("lora-sb", "it averages the cores of several frozen bases, and lora has none"),
}

__all__ = [
    "METHODS",
    "NEEDS_ADAPTER",
    "Broadcast",
    "Diagnostics",
    "FedExKeep",
    "Increment",
    "Method",
    "Payload",
    "Spec",
    "State",
    "Update",
    "View",
]
