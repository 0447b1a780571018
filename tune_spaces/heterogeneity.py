"""How uneven the clients are: Dirichlet alpha x clients x method. Needs labels: classification data of one source.

fedray sweep --space tune_spaces/heterogeneity.py --model.path ... --data.source ... --model.task classification
"""

from ray import tune

from fedray.sweep import Sweep

SWEEP = Sweep(
    space={
        "entry": tune.grid_search(["fedit", "fedex", "ffa", "fed-sb"]),
        "data.alpha": tune.grid_search([0.1, 0.5, 5.0]),
        "federation.clients": tune.grid_search([3, 7, 17]),
    },
    base={"data.partition": "dirichlet", "federation.rounds": 10},
    seeds=(0, 1),
)
