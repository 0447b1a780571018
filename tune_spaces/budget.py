"""The best metric under a byte budget and an epsilon budget, searched by Optuna (pip install 'fedray[optuna]').

A trial ends when another round would pass `federation.max_bytes`, so cheap methods get more rounds out of the same
budget; every trial keeps epsilon 8, and all of them together `privacy.sweep_epsilon`.
  fedray sweep --space tune_spaces/budget.py --samples 30 --federation.max_bytes 2e7 --model.path ... --data.source ...
"""

from ray import tune

from fedray.sweep import Sweep

SWEEP = Sweep(
    space={
        "entry": tune.choice(["fedit", "ffa", "fedex", "fed-sb"]),
        "adapter.rank": tune.choice([2, 4, 8, 16]),
        "federation.lr": tune.loguniform(1e-3, 3e-1),
        "federation.local_steps": tune.choice([8, 16]),
    },
    base={
        "federation.rounds": 20,
        "federation.batch_size": 32,
        "federation.schedule": "constant",
        "federation.max_bytes": 2e7,
        "privacy.epsilon": 8.0,
        "privacy.delta": 1e-6,
        "privacy.sweep_epsilon": 40.0,
    },
    search="optuna",
    samples=12,
)
