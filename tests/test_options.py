"""What methods and adapters declare: options in the config, help and refusals; what a class must state itself."""

import subprocess
import sys
from dataclasses import dataclass

import pytest
import yaml

from fedray.config.declared import of_register, with_options
from fedray.config.read import from_dict, help_groups, help_lines, known_keys, merged, read_config
from fedray.config.sections import Section
from fedray.errors import ConfigError
from fedray.methods import METHODS
from fedray.methods.fedit import FedIT
from fedray.options import option, options
from fedray.registers import load

#: The keys of config.yaml by section, whatever the method.
KEYS = {
    "model": "path task dtype quantise base_rank compute attention checkpointing loss_chunk dropout",
    "adapter": (
        "kind rank alpha rslora scale cores subspace subspace_examples subspace_source "
        "subspace_oversample subspace_passes dropout targets heads"
    ),
    "method": (
        "name weights assignment residual_rank split residual fra_rounds energy oversample correction "
        "sparse_scale rotation server_optimizer server_lr server_beta1 server_beta2 server_tau "
        "robust_rule robust_attackers"
    ),
    "data": (
        "source subset train_split test_split validation_split evaluate_on held_out text text_pair label "
        "completion input template system choices key judge max_length group_by_length partition alpha "
        "labels_per_client shards_per_client column limit test_limit client_held_out"
    ),
    "generation": "max_new_tokens temperature top_p",
    "federation": (
        "clients rounds cohort local_steps batch_size accumulate optimizer lr weight_decay schedule "
        "schedule_over warmup max_grad_norm proximal keep_optimizer max_bytes evaluate_every patience "
        "best_round deadline quorum max_update_norm max_update_ratio exact_report buffer replay wire wire_feedback"
    ),
    "worker": "count gpus cpus ranks backend zero_stage offload batch_clients cache profile wait",
    "privacy": (
        "epsilon delta noise unit trust clip count_noise subspace_fraction adaptive_clip secure_aggregation "
        "secure_threshold secure_colluding identities sweep_epsilon lifetime_epsilon key_dir"
    ),
    "output": "dir resume keep checkpoints track",
}


# --- what a method's class states -------------------------------------------------------------------------------


@pytest.mark.parametrize("left_out", ["exact", "linear", "kept"])
def test_a_method_states_itself_what_privacy_relies_on(left_out):
    stated = {"exact": "no", "linear": False, "kept": ()}
    type("Whole", (FedIT,), dict(stated))
    del stated[left_out]
    with pytest.raises(TypeError, match=f"Forgetful must state {left_out} in its own body"):
        type("Forgetful", (FedIT,), stated)


@pytest.mark.parametrize("stated", [{"exact": True}, {"linear": "no"}, {"kept": ("C",)}])
def test_what_a_method_states_is_of_its_kind(stated):
    with pytest.raises(TypeError, match="exact is a word, linear True or False, kept some of 'B' and 'A'"):
        type("Vague", (FedIT,), {"exact": "no", "linear": False, "kept": (), **stated})


def test_a_class_that_goes_by_anothers_name_does_not_replace_it():
    with pytest.raises(TypeError, match=r"fedit.FedIT and fedit.FedIT go by one name, 'fedit': state another"):
        list(load("fedray.methods", ["fedit.FedIT", "ffa.FFA", "fedit.FedIT"]))


def test_what_is_kept_are_factors_of_the_adapters_pair():
    assert [name for name, method in METHODS.items() if method.kept] == ["fedsa"]
    assert all(set(method.kept) <= {"A", "B"} for method in METHODS.values())


def test_an_adapter_that_no_method_has_heard_of_is_refused_with_a_reason():
    class Odd:
        kind, unpaired = "odd", ""

    assert METHODS["fedit"].why_not(Odd).startswith("it is not known to be sound there: it needs adapter.kind lora")
    assert "cutting odd's factors" in METHODS["hetlora"].why_not(Odd)
    assert "says nothing of odd's product" in METHODS["fedask"].why_not(Odd)


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_config_yaml_has_the_same_keys_whatever_the_method(name):
    config = from_dict({"method": {"name": name}, "adapter": {"kind": METHODS[name].adapters[0]}})
    values = yaml.safe_load(config.to_yaml())
    assert {section: set(keys.split()) for section, keys in KEYS.items()} == {
        section: set(keys) for section, keys in values.items() if isinstance(keys, dict) and section != "clients"
    }
    assert values.keys() - KEYS.keys() == {"clients", "seed", "engine"}


def test_help_has_the_options_under_the_names_of_those_that_have_them():
    groups = {group: [line.key for line in lines] for group, lines in help_groups() if group}
    assert groups["method florist"] == ["method.energy"]
    assert groups["method fra, florist"] == ["method.residual"]
    assert groups["adapter abba"] == ["adapter.scale"] and len(groups["adapter lora-sb"]) == 5
    assert "method.server_tau" in groups["server optimizer"]
    docs = {line.key: line.doc for line in help_lines()}
    assert docs["method.energy"] == "florist: share of sum S_j^2 that a layer's rank keeps (default 0.99)."
    assert docs["method.residual_rank"].startswith("fedex, flora: truncate the base update to this rank;")
    assert docs["adapter.subspace_source"].startswith("lora-sb, subspace public: the public data set")
    assert [line.key for _, lines in help_groups() for line in lines] == known_keys()


NEW = """
from dataclasses import dataclass
from fedray.methods import METHODS
from fedray.methods.fedit import FedIT
from fedray.options import option

@dataclass(frozen=True)
class Sparkling(FedIT):
    name = "sparkling"
    exact = "no"
    linear = False
    kept = ()
    sparkle: float = option(0.5, "how much it sparkles", gt=0)

METHODS["sparkling"] = Sparkling  # the line in the register

from fedray.cli import main
from fedray.config.build import make_method
from fedray.config.read import from_dict
print(make_method(from_dict({"method": {"name": "sparkling", "sparkle": 2}})))
main(["run", "--help"])
for flags in ("--method.sparkle 2", "--method.name sparkling --method.sparkle 0"):
    assert main(["run", *flags.split()]) == 2
"""


TASK = """
from fedray.data.tasks import TASKS
from fedray.data.tasks.causal_lm import CausalLM

class Hinted(CausalLM):
    name, model, metric, higher_is_better, target, labelled = "hinted", "causal-lm", "loss", False, "hint", False
    reported = {"loss": False}
    options = {"hint": "Column with a hint."}
    takes_builtin = True

TASKS["hinted"] = Hinted  # the line in the register

from fedray.cli import main
from fedray.config.read import from_dict, help_lines
print(from_dict({"model": {"task": "hinted"}, "data": {"hint": "column"}}).data.hint)
print({line.key: line.doc for line in help_lines()}["data.hint"])
assert main("run --data.hint column".split()) == 2
"""


def test_a_new_tasks_column_needs_no_other_file():
    done = subprocess.run([sys.executable, "-c", TASK], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[:2] == ["column", "Column with a hint."]
    assert "data.hint belongs to hinted; for causal-lm give data.completion" in done.stderr


def test_a_new_methods_option_needs_no_other_file():
    done = subprocess.run([sys.executable, "-c", NEW], capture_output=True, text=True, check=True)
    assert "sparkle=2.0" in done.stdout
    heading = done.stdout.index("method sparkling:")
    assert "sparkling: how much it sparkles (default 0.5)." in done.stdout[heading:]
    assert "method.sparkle belongs to sparkling, not to fedex: leave it out" in done.stderr
    assert "method.sparkle: input should be greater than 0" in done.stderr


@dataclass(frozen=True)
class One:
    a: int = option(1, "a number")
    b: int = option(2, "another", ge=2)


@dataclass(frozen=True)
class Less(One):
    b: int = 2


@dataclass(frozen=True)
class Otherwise(One):
    a: int = option(7, "a number")


def test_an_option_is_inherited_until_a_field_takes_it_away():
    assert list(options(One)) == ["a", "b"] and list(options(Less)) == ["a"]
    register = of_register("thing", {"one": One, "less": Less})
    assert register["a"].owners == ("one", "less") and register["b"].owners == ("one",)


def test_an_option_that_two_classes_declare_differently_or_the_section_has_itself_fails_at_import():
    with pytest.raises(TypeError, match="thing otherwise declares a otherwise than one"):
        of_register("thing", {"one": One, "otherwise": Otherwise})

    class Own(Section):
        a: int = 3

    with pytest.raises(TypeError, match="Own has a itself"):
        with_options(of_register("thing", {"one": One}))(Own)


# --- a config with some keys changed ----------------------------------------------------------------------------


def test_merged_sets_dotted_keys_from_plain_values():
    config = read_config(
        ["--adapter.rank", "a=4,ward.7=2", "--method.name", "flora", "--clients.ward.7.lr", "0.1", "--seed", "3"]
    )
    changes = {"adapter.rank": {"a": 8}, "clients.ward.7.batch_size": 2, "clients.ward.7.lr": None, "engine": "inline"}
    changed = merged(config, changes)
    assert changed.adapter.rank == {"a": 8} and (changed.seed, changed.engine) == (3, "inline")
    assert (changed.clients["ward.7"].batch_size, changed.clients["ward.7"].lr) == (2, None)
    assert config.adapter.rank == {"a": 4, "ward.7": 2} and merged(config, {}) == config


def test_merged_leaves_defaults_unset_as_flags_do():
    flags = read_config(["--method.name", "fra", "--federation.rounds", "9"])
    changed = merged(read_config(["--method.name", "fra"]), {"federation.rounds": 9})
    assert changed == flags and changed.model_dump(exclude_unset=True) == flags.model_dump(exclude_unset=True)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"federation.rouns": 3}, "unknown key 'federation.rouns': did you mean federation.rounds?"),
        ({"clients.a.lrr": 3}, "unknown key 'clients.a.lrr'"),
        ({"method.energy": 0.5}, "method.energy belongs to florist, not to fedex"),
        ({"federation.lr": "fast"}, "federation.lr: input should be a valid number"),
    ],
)
def test_merged_refuses_as_reading_does(changes, sentence):
    with pytest.raises(ConfigError) as refused:
        merged(read_config([]), changes)
    assert sentence in str(refused.value)
