"""GLUE's metrics on fixed predictions, and its one task with numbers instead of classes (STS-B)."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from support import final_tensors, run
from transformers import AutoModel, AutoTokenizer

from fedray.data.tasks import TASKS
from fedray.errors import ConfigError


@pytest.fixture
def pairs(tmp_path):
    """Sentence pairs that are the more alike the higher their number."""
    generator, rows = np.random.default_rng(0), []
    words = ["cat", "dog", "sun", "moon", "tree", "ship"]
    for _ in range(48):
        shared = int(generator.integers(0, 6))
        one = list(generator.permutation(words))
        other = one[:shared] + ["nothing"] * (5 - shared)
        rows.append({"sentence1": " ".join(one), "sentence2": " ".join(other), "label": float(shared)})
    path = tmp_path / "stsb.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def headless(tiny, tmp_path_factory):
    """The tiny BERT as it was before anybody fine-tuned it."""
    folder = tmp_path_factory.mktemp("headless")
    AutoModel.from_pretrained(tiny / "bert").save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny / "bert").save_pretrained(folder)
    return folder


def settings(pairs, headless):
    return {
        "model": {"path": str(headless), "task": "regression", "dropout": 0},
        "data": {"source": str(pairs), "text": "sentence1", "text_pair": "sentence2", "max_length": 48},
    }


def test_numbers_are_learned(make_config, pairs, headless):
    federation = {"clients": 2, "rounds": 3, "local_steps": 16, "batch_size": 8, "lr": 0.02}
    folder = run(make_config(**settings(pairs, headless), method={"name": "fedex"}, federation=federation))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metric"] == "pearson"
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    # A constant guess has correlation 0; the numbers' mean square is 9.2, and their variance 2.9.
    assert records[-1]["metrics"]["pearson"] > 0.3 and records[-1]["metrics"]["loss"] < 6.0
    assert "AutoModelForSequenceClassification" in (folder / "adapter" / "README.md").read_text()


def test_clients_together_learn_the_same_numbers(make_config, pairs, headless):
    federation = {"clients": 3, "rounds": 1, "local_steps": 2, "batch_size": 4, "lr": 0.01}
    one, together = (
        final_tensors(
            run(
                make_config(
                    **settings(pairs, headless),
                    federation=federation,
                    worker={"cpus": 1, "backend": "torch", "batch_clients": n},
                )
            )
        )
        for n in (1, 3)
    )
    assert all(torch.allclose(one[name], together[name], atol=1e-5) for name in one)


def test_metrics_of_numbers(make_config, pairs, headless):
    task = TASKS["regression"](make_config(**settings(pairs, headless)), None, None)
    guesses, labels = [1.0, 2.5, 0.5, 4.0, 3.0], [1.0, 2.0, 0.0, 5.0, 5.0]
    entries = [{"guess": g, "label": y} for g, y in zip(guesses, labels, strict=True)]
    found = task.metrics(entries)
    assert found["pearson"] == pytest.approx(np.corrcoef(guesses, labels)[0, 1])
    ranks = [[2, 3, 1, 5, 4], [2, 3, 1, 4.5, 4.5]]  # ties share their mean rank
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["loss"] == pytest.approx((0 + 0.25 + 0.25 + 1 + 4) / 5)
    assert task.metrics([{**e, "guess": 1.0} for e in entries])["pearson"] == 0.0


def test_a_row_without_a_number_is_named(make_config, pairs, headless):
    task = TASKS["regression"](make_config(**settings(pairs, headless)), None, None)
    for bad in ("four", None, float("nan")):
        with pytest.raises(ConfigError, match="row 2: .* is no number"):
            task.check_rows(Dataset.from_dict({"label": ["1.5", None if bad is None else str(bad)]}), False)


def test_f1_of_the_second_class_as_glue_has_it(make_config):
    class Two:
        classes = (0, 1)

    task = TASKS["classification"](make_config(task="classification"), Two(), None)
    guesses, labels = [1, 1, 0, 0, 1, 1], [1, 0, 0, 1, 1, 1]
    entries = [{"guess": g, "label": y, "loss": 0.0} for g, y in zip(guesses, labels, strict=True)]
    # true positives 3, false positives 1, false negatives 1
    assert task.metrics(entries)["f1_binary"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))


def test_a_head_of_another_task_is_refused(make_config, pairs, tiny):
    given = settings(pairs, tiny / "bert")
    with pytest.raises(ConfigError, match="a head of 1 outputs.*give the model before it was fine-tuned"):
        run(make_config(**given))
