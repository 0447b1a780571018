"""The table of a shape that ships says what the model itself would."""

import json
import subprocess
import sys

import pytest

from fedray.config.read import read_config
from fedray.errors import ConfigError
from fedray.training import outline

ADAPTERS = {
    "lora": "--method.name fedex --adapter.rank 16",
    "rslora": "--method.name fedex --adapter.rslora",
    "lora-sb": "--adapter.kind lora-sb --method.name fed-sb",
    "abba": "--adapter.kind abba --adapter.rank 9 --adapter.alpha 4",
    "ravan": "--adapter.kind ravan --method.name ravan",
}


def config_of(shape, flags):
    return read_config(["--model.path", shape, *flags.split()])


@pytest.mark.parametrize("shape", outline.shape_names())
def test_a_table_says_what_the_model_itself_says(shape):
    for flags in (
        "--adapter.targets all-linear",
        "--adapter.targets q_proj,v_proj",
        "--adapter.targets self_attn.o_proj,down_proj",
    ):
        config = config_of(shape, flags)
        assert outline._from_table(config) == outline.from_skeleton(config)


@pytest.mark.parametrize("flags", ADAPTERS.values(), ids=ADAPTERS)
def test_every_adapter_has_the_same_layers_in_both(flags):
    config = config_of("llama-3.2-1b", f"{flags} --adapter.targets k_proj")
    assert outline._from_table(config) == outline.from_skeleton(config)


@pytest.mark.parametrize(
    "flags",
    [
        "--adapter.targets .*(q|k)_proj",
        "--adapter.targets self_attn.o_proj",
        "--adapter.heads lm_head --adapter.targets q_proj",
        "--model.task classification --data.source x.csv --data.label y",
        "--adapter.targets lm_head",
    ],
)
def test_what_the_table_does_not_hold_is_left_to_the_model(flags):
    assert outline._from_table(config_of("mistral-7b", flags)) is None


@pytest.mark.parametrize("targets", ["embed_tokens", "nothing"])
def test_targets_that_are_no_layers_are_refused_as_ever(targets):
    with pytest.raises(ConfigError, match="adapter.targets"):
        outline.make_outline(config_of("mistral-7b", f"--adapter.targets {targets}"))


def test_a_rank_without_room_is_refused_in_the_same_words():
    config = config_of("llama-3.2-1b", "--adapter.rank 513 --adapter.targets k_proj")
    with pytest.raises(ConfigError) as by_table:
        outline.make_outline(config)
    with pytest.raises(ConfigError) as by_model:
        outline.from_skeleton(config)
    assert str(by_table.value) == str(by_model.value)
    assert "at most 512" in str(by_table.value)


def test_a_plan_for_a_shape_that_ships_does_without_the_libraries_that_build_models():
    """They take longer to import than the plan to make."""
    code = (
        "import sys; from fedray.cli import main; main(['plan', '--model.path', 'mistral-7b', '--json']); "
        "print(*(m for m in ('transformers', 'peft', 'ray', 'datasets') if m in sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=250)
    assert json.loads(done.stdout)["adapted_layers"] == 224
    assert done.stderr.strip() == ""
