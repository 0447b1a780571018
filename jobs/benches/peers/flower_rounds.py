"""Flower's simulator over clients that add one to what they get: seconds of each round, as JSON.

Run by `python jobs/bench.py overhead` with the Python of an environment that has flwr[simulation].
"""

import json
import sys
import time

import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.simulation import run_simulation

CLIENTS, ROUNDS, NUMBERS = (int(word) for word in sys.argv[1:4])
ENDS: list[float] = []


class Adds(NumPyClient):
    """No model: what is left is what the framework costs."""

    def fit(self, parameters, config):
        return [array + 1 for array in parameters], 1, {}


class Timed(FedAvg):
    """Notes when each round's updates are one."""

    def aggregate_fit(self, *args, **kwargs):
        result = super().aggregate_fit(*args, **kwargs)
        ENDS.append(time.perf_counter())
        return result


def serve(context: Context) -> ServerAppComponents:
    start = ndarrays_to_parameters([np.zeros(NUMBERS // 2, dtype=np.float32) for _ in range(2)])
    strategy = Timed(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=CLIENTS,
        min_available_clients=CLIENTS,
        initial_parameters=start,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=ROUNDS))


run_simulation(
    server_app=ServerApp(server_fn=serve),
    client_app=ClientApp(client_fn=lambda context: Adds().to_client()),
    num_supernodes=CLIENTS,
    backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
)
print(json.dumps(np.diff(ENDS).tolist()))
