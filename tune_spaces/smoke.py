"""Three minutes on two cores, with the built-in demo: methods x ranks x epsilons, halved by ASHA. To see that
everything works."""

from ray import tune

from fedray.sweep import Sweep

SWEEP = Sweep(
    space={
        "entry": tune.grid_search(["fedex", "ffa"]),
        "adapter.rank": tune.grid_search([2, 8]),
        "privacy.epsilon": tune.grid_search([None, 8.0]),
    },
    base={
        "federation.rounds": 3,
        "federation.local_steps": 2,
        "federation.batch_size": 8,
        "data.max_length": 96,
        "data.test_limit": 24,
        "worker.count": 1,
        "worker.cpus": 1,
    },
    stop="asha",
    grace=1,
    reduction=2,
)
