"""Tasks state what they take of a config, in the words of the config's own checks; none is imported without."""

from __future__ import annotations

import pytest

from fedray.config.sections import BUILTIN, Config, DataSection, ModelSection
from fedray.data import builtin
from fedray.data.tasks import TASKS, check_task
from fedray.data.tasks.base import Task
from fedray.errors import ConfigError

CASES = [
    (
        "causal-lm",
        {"text_pair": "other"},
        "data.text_pair belongs to classification and regression; for causal-lm give data.completion",
    ),
    (
        "classification",
        {"source": BUILTIN},
        "the built-in corpus is for causal-lm: give data.source for classification",
    ),
    (
        "classification",
        {"source": "x.csv", "completion": "answer"},
        "data.completion belongs to causal-lm, instruction, math, choice and nlg; for classification give data.label",
    ),
    ("classification", {"source": "x.csv"}, "the built-in model is for causal-lm: give model.path for classification"),
]


@pytest.mark.parametrize(("task", "data", "sentence"), CASES, ids=[sentence[:40] for _, _, sentence in CASES])
def test_what_does_not_fit_a_task_is_refused_in_the_configs_own_words(task, data, sentence):
    from fedray.config.read import from_dict

    unchecked = Config.model_construct(model=ModelSection(task=task), data=DataSection(**data))
    with pytest.raises(ValueError) as refused:
        check_task(unchecked)
    assert str(refused.value) == sentence
    with pytest.raises(ConfigError) as read:
        from_dict({"model": {"task": task}, "data": data})
    assert sentence in str(read.value)


def test_what_fits_is_taken():
    check_task(Config())
    check_task(Config(data=DataSection(source="x.csv", completion="answer")))
    check_task(
        Config(model=ModelSection(path="m", task="classification"), data=DataSection(source="x.csv", text_pair="other"))
    )
    assert builtin.BUILTIN == BUILTIN


def test_options_are_keys_of_the_data_section_with_their_docs():
    for task in TASKS.values():
        assert task.target in DataSection.model_fields
        for option, doc in task.options.items():
            assert DataSection.model_fields[option].default is None  # not given: nothing to refuse
            assert DataSection.model_fields[option].description.strip(".").endswith(doc.strip("."))


def test_a_task_that_leaves_something_open_is_refused_when_it_is_imported():
    with pytest.raises(TypeError, match="task Half does not state metric, .*takes_builtin"):

        class Half(Task):
            name = "half"
            model = "causal-lm"
