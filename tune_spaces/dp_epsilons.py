"""Methods x epsilon, none included: what privacy costs each method. Trials are releases of the same data: the report adds them up.

The trials without privacy make that sum infinite; leave them out (and set `--privacy.sweep_epsilon`) where the data are not public.
    fedray sweep --space tune_spaces/dp_epsilons.py --model.path ... --data.source ... --model.task classification
"""

from ray import tune

from fedray.sweep import Sweep

# DP-SGD takes larger batches, fewer steps and its own rates: the fewer numbers train, the larger.
METHODS = [
    {"entry": "fed-sb", "adapter.rank": 8, "federation.lr": 2e-1},
    {"entry": "ffa", "adapter.rank": 8, "federation.lr": 1e-1},
    {"entry": "fedex", "adapter.rank": 8, "federation.lr": 3e-2},
    {"entry": "fedit", "adapter.rank": 8, "federation.lr": 3e-2},
]

SWEEP = Sweep(
    space={"method": tune.grid_search(METHODS), "privacy.epsilon": tune.grid_search([None, 8.0, 3.0, 1.0])},
    base={"federation.rounds": 7, "federation.local_steps": 14, "federation.batch_size": 48},
    seeds=(0, 1, 2),
)
