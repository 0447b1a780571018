"""A trial's config: the base config with the point's values set, as the command line would set them."""

import numpy as np
import pytest

from fedray.config.read import read_config
from fedray.config.sections import Config
from fedray.errors import ConfigError
from fedray.sweep.trials import as_word, label, trial_config

BASE = ["--adapter.alpha", "4", "--privacy.noise", "0.5", "--clients.dr.who.lr", "0.1", "--federation.clients", "3"]


@pytest.mark.parametrize(
    "key, value",
    [
        ("adapter.rank", 4),
        ("adapter.rank", "4"),
        ("adapter.rank", np.int64(4)),
        ("adapter.targets", ["q_proj", "v_proj"]),
        ("adapter.targets", "q_proj,v_proj"),
        ("adapter.rslora", True),
        ("adapter.rslora", "true"),
        ("federation.lr", 0.1 + 0.2),
        ("federation.lr", np.float64(0.3)),
        ("federation.lr", "1e-3"),
        ("federation.max_grad_norm", None),
        ("privacy.noise", None),
        ("privacy.noise", "none"),
        ("clients.dr.who.lr", 0.5),
        ("method.name", "ffa"),
    ],
)
def test_a_value_means_what_it_means_on_the_command_line(key, value):
    config = trial_config(read_config(BASE), {key: value, "seed": 3})
    assert config == read_config([*BASE, f"--{key}", as_word(value), "--seed", "3"])


def test_ranks_by_client_can_be_varied_where_they_are_named_with_their_key():
    values = {"ranks": {"adapter.rank": {"a": 2, "b": 4}, "method.name": "flora"}}
    assert trial_config(read_config([]), values).adapter.rank == {"a": 2, "b": 4}


def test_an_entry_stands_for_its_keys_and_others_of_the_point_win():
    base = read_config(["--adapter.kind", "abba"])
    config = trial_config(base, {"entry": "lora-sb+fed-sb@6", "seed": 0})
    assert (config.adapter.kind, config.method.name, config.adapter.rank) == ("lora-sb", "fed-sb", 6)
    assert trial_config(base, {"entry": "fedex"}).adapter.kind == "abba"  # the base's own, where it fits
    assert trial_config(Config(), {"entry": "fed-sb"}).adapter.kind == "lora-sb"
    assert trial_config(base, {"entry": "fedex", "adapter.kind": "lora"}).adapter.kind == "lora"


@pytest.mark.parametrize(
    "values, sentence",
    [
        ({"adapter.rank": 0}, "adapter.rank: input should be greater than or equal to 1, not 0"),
        ({"federation.lr": "fast"}, "federation.lr: input should be a valid number"),
        ({"adapter.rnk": 4}, "the space's key 'adapter.rnk' is not known: did you mean adapter.rank?"),
        ({"clients.a": 4}, "unknown key 'clients.a'"),
        ({"clients.a.rate": 4}, "unknown key 'clients.a.rate'"),
        ({"entry": "fedxx"}, "--methods 'fedxx' is not known"),
        ({"entry": "fedex@0"}, "adapter.rank: input should be greater than or equal to 1, not 0"),
    ],
)
def test_a_bad_value_is_refused_in_one_sentence(values, sentence):
    with pytest.raises(ConfigError) as error:
        trial_config(Config(), values)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_labels_hold_no_character_that_a_path_minds():
    assert label(
        {"entry": "abba+fedex@4", "federation.lr": 0.00123456, "privacy.noise": None, "adapter.rslora": True}
    ) == ("abba+fedex@4,lr=0.001235,noise=null,rslora=true")
    assert label({"data.source": "/data/a b.csv"}) == "source=-data-a-b.csv"
