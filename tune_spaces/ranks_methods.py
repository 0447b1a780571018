"""Methods x adapters x ranks, two seeds: what a larger adapter buys, and at how many bytes. Each pair has a rate of
its own kind.

LoRA-SB trains r^2 numbers a layer and RAVAN four times as many, so they take larger ranks and rates.
    fedray sweep --space tune_spaces/ranks_methods.py --model.path ... --data.source ... --model.task classification
"""

from ray import tune

from fedray.sweep import Sweep

LORA = [
    {"entry": method, "adapter.rank": rank, "federation.lr": 2e-3}
    for method in ("fedit", "ffa", "fedex", "fra")
    for rank in (2, 4, 8, 16)
]
ABBA = [{"entry": "abba+fedex", "adapter.rank": rank, "federation.lr": 2e-3} for rank in (4, 8, 16)]
SMALL = [
    {"entry": entry, "adapter.rank": rank, "federation.lr": 2e-2}
    for entry in ("lora-sb+fed-sb", "ravan+ravan")
    for rank in (8, 16, 32)
]

SWEEP = Sweep(
    space={"pair": tune.grid_search([*LORA, *ABBA, *SMALL])},
    base={"federation.rounds": 10},
    seeds=(0, 1),
    stop="asha",
    grace=3,
)
