"""lm-evaluation-harness on an exported adapter: a task of our own files, since its own come from the hub."""

import json

import pytest
import torch
from support import options, run, trainer_and_view

from fedray.cli import main
from fedray.errors import ConfigError
from fedray.federation import results
from fedray.federation.harness import harness

ROWS = [
    {"question": "the sky is", "choices": ["blue", "a fish"], "answer": 0},
    {"question": "two and two are", "choices": ["five", "four"], "answer": 1},
    {"question": "water is", "choices": ["wet", "dry as dust"], "answer": 0},
    {"question": "a cat says", "choices": ["moo", "meow"], "answer": 1},
]
TASK = """
task: little
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def tasks(tmp_path):
    file = tmp_path / "little.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "little.yaml").write_text(TASK.format(file=file))
    return tmp_path / "tasks"


def test_its_accuracy_is_that_of_the_trained_models_likelihoods(make_config, tasks, capsys):
    config = make_config(**options("lora+fedex"))
    folder = run(config)
    found = harness(folder, ["little"], include=tasks)
    trainer, _ = trainer_and_view(config)
    tokenizer = trainer.task.tokenizer
    view, right = results.global_view(config, results.load_state(folder, config, 0)), 0
    for row in ROWS:
        scores = []
        for choice in row["choices"]:
            # As the harness cuts it, with the end that this byte tokenizer writes after every text.
            asked, both = (tokenizer(text)["input_ids"] for text in (row["question"], f"{row['question']} {choice}"))
            ids, said = torch.tensor([both]), both[len(asked) :]
            logits = trainer.logits(view, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            logp = logits[0, len(asked) - 1 : -1].log_softmax(-1)
            scores.append(logp.gather(1, torch.tensor(said)[:, None]).sum().item())
        right += scores.index(max(scores)) == row["answer"]
    assert found["little"]["acc,none"] == right / len(ROWS)

    assert main(["evaluate", str(folder), "--tasks", "little", "--tasks-from", str(tasks), "--limit", "2"]) == 0
    assert "little: acc,none" in capsys.readouterr().out


def test_what_it_cannot_measure_is_refused(make_config, tasks):
    folder = run(make_config(federation__rounds=1))
    with pytest.raises(ConfigError, match="has no task 'nobodys'"):
        harness(folder, ["little", "nobodys"], include=tasks)
    with pytest.raises(ConfigError, match="clients have models of their own"):
        harness(run(make_config(**options("lora+fedsa"))), ["little"], include=tasks)
    with pytest.raises(ConfigError, match="trained a classification model"):
        harness(run(make_config(task="classification", federation__rounds=1)), ["little"], include=tasks)
