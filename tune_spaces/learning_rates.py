"""The fair-comparison grid: each method with its own learning rates, judged on the validation split, never on the
test split.

Tuned rates bring most LoRA variants within one or two percent of each other: a comparison at one rate for all is void.
Afterwards run the best of each with `data.evaluate_on test`, or use `fedray compare`, which does both.
"""

from ray import tune

from fedray.sweep import Sweep

RATES = {
    "fedit": (3e-4, 1e-3, 3e-3, 1e-2),
    "ffa": (1e-3, 3e-3, 1e-2, 3e-2),
    "fedex": (3e-4, 1e-3, 3e-3, 1e-2),
    "fra": (3e-4, 1e-3, 3e-3, 1e-2),
    "flora": (3e-4, 1e-3, 3e-3, 1e-2),
    "lora-sb+fed-sb": (3e-3, 1e-2, 3e-2, 1e-1),
}

SWEEP = Sweep(
    space={
        "tuned": tune.grid_search(
            [{"entry": entry, "federation.lr": lr} for entry, rates in RATES.items() for lr in rates]
        )
    },
    base={"federation.rounds": 8, "data.evaluate_on": "validation"},
    stop="asha",
    grace=2,
)
