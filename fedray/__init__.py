"""fedray: exact, private, federated low-rank fine-tuning of language models on Ray."""

import os

# fedray phones no one: these libraries read the switches once, when they are first imported.
for _switch, _off in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}.items():
    os.environ[_switch] = _off

__version__ = "0.1.0"
