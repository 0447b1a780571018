"""Methods x ranks x epsilon, none included: what privacy costs each method. Trials are releases of the same data: the
report adds them up.

The trials without privacy make that sum infinite; leave them out (and set `--privacy.sweep_epsilon`) where the data
are not public.
    fedray sweep --space tune_spaces/dp_epsilons.py --model.path ... --data.source ... --model.task classification
"""

from ray import tune

from fedray.sweep import Sweep

# DP-SGD takes larger batches, fewer steps and its own rates: the fewer numbers train, the larger. (rate without
# privacy, rate with)
RATES = {"fed-sb": (4e-2, 2.5e-1), "ffa": (1.5e-2, 1e-1), "fedex": (1e-3, 3e-2), "fedit": (6e-3, 3e-2)}
EPSILONS = (None, 8.0, 1.0)

SWEEP = Sweep(
    space={
        "method": tune.grid_search(
            [
                {"entry": entry, "privacy.epsilon": epsilon, "federation.lr": rates[epsilon is not None]}
                for entry, rates in RATES.items()
                for epsilon in EPSILONS
            ]
        ),
        "adapter.rank": tune.grid_search([4, 16]),
    },
    base={"federation.rounds": 7, "federation.local_steps": 14, "federation.batch_size": 48},
    seeds=(0, 1),
)
