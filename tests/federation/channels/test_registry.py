"""What a config may not ask of a channel."""

import json

import pytest

from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.federation.prepare import prepare


def test_what_would_not_be_private_is_refused(make_config):
    for wrong, words in (
        ({"privacy": {"delta": 1e-5}}, "privacy.delta without privacy.epsilon"),
        ({"privacy": {"unit": "client"}}, "privacy.unit without privacy.epsilon"),
        (
            {
                "privacy": {"epsilon": 1.0},
                "method": {"name": "fed-sb"},
                "adapter": {"kind": "lora-sb", "subspace": "gradient"},
            },
            "reads the clients' data without noise",
        ),
        (
            {
                "privacy": {"epsilon": 1.0},
                "method": {"name": "fed-sb"},
                "adapter": {"kind": "lora-sb", "subspace": "gradient-raw"},
            },
            "reads the clients' data without noise",
        ),
        (
            {"method": {"name": "fed-sb"}, "adapter": {"kind": "lora-sb", "subspace": "private"}},
            "needs privacy.epsilon",
        ),
        ({"privacy": {"epsilon": 1.0}, "data": {"client_held_out": 0.2}}, "client_held_out"),
        ({"privacy": {"epsilon": 1.0}, "method": {"name": "flora"}, "adapter": {"rank": [2, 1]}}, "one rank"),
        ({"privacy": {"epsilon": 1.0, "unit": "client"}, "method": {"name": "fedex"}}, "noise to the mean"),
        ({"privacy": {"epsilon": 1.0}, "model": {"dropout": 0.1}}, "model.dropout 0.1 would let one example change"),
        ({"privacy": {"noise": 1.0}, "adapter": {"dropout": 0.2}}, "adapter.dropout 0.2 would let one example change"),
        ({"privacy": {"epsilon": 1.0, "unit": "client"}, "method": {"name": "fedsa"}}, "keep factors of their own"),
        (
            {"privacy": {"epsilon": 1.0, "unit": "client"}, "method": {"name": "ffa", "weights": "examples"}},
            "use equal",
        ),
        (
            {"privacy": {"epsilon": 1.0, "unit": "client", "count_noise": 3.0}, "method": {"name": "ffa"}},
            "belongs to privacy.unit example",
        ),
        ({"privacy": {"epsilon": 1.0, "adaptive_clip": 0.5}}, "belongs to privacy.unit client"),
        ({"privacy": {"epsilon": 1.0, "subspace_fraction": 0.5}}, "belongs to adapter.subspace private"),
        (
            {"privacy": {"secure_aggregation": True}, "method": {"name": "fedex"}},
            "opens only the sum of the updates, and fedex needs each one",
        ),
        ({"privacy": {"secure_aggregation": True}, "method": {"name": "flora"}}, "flora needs each one"),
        (
            {"privacy": {"secure_aggregation": True}, "method": {"name": "fedsa"}},
            "with method fedsa the coordinator's checkpoint would hold",
        ),
        (
            {
                "privacy": {"secure_aggregation": True},
                "method": {"name": "fedit"},
                "federation": {"keep_optimizer": True},
            },
            "with federation.keep_optimizer the coordinator's",
        ),
        (
            {
                "privacy": {"secure_aggregation": True, "epsilon": 1.0, "unit": "client"},
                "method": {"name": "fedit"},
                "federation": {"keep_optimizer": True},
            },
            "from which its update can be read",
        ),
        ({"privacy": {"secure_threshold": 0.5}}, "belongs to privacy.secure_aggregation"),
        (
            {
                "privacy": {"epsilon": 1.0, "unit": "client", "secure_aggregation": True},
                "method": {"name": "ffa"},
                "federation": {"cohort": 3},
            },
            "every client in every round",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            from_dict(wrong)
    with pytest.raises(ConfigError, match="have 3 or more"):
        prepare(make_config(method__name="ffa", federation__clients=2, privacy={"secure_aggregation": True}))
    with pytest.raises(ConfigError, match="client 'client-0' has fewer examples than its batch_size 500"):
        prepare(make_config(task="classification", privacy={"noise": 1.0}, federation__batch_size=500))
    config = make_config(privacy={"epsilon": 1.0, "unit": "example", "clip": 0.1})
    assert from_dict(json.loads(config.model_dump_json())) == config
