"""The real encoder on real SST-2, from ../shared."""

import json
import statistics
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import SHARED
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedray.config.read import read_config
from fedray.federation import results
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.training.local import LocalTrainer

EXAMPLE = (
    f"--engine inline --model.path {SHARED}/models/minilm-l6 --model.task classification --model.dropout 0 "
    f"--data.source {SHARED}/data/sst2 "
    "--data.partition dirichlet --data.alpha 0.5 --data.max_length 64 --adapter.rank 8 --adapter.targets query,value "
    "--federation.clients 3 --federation.batch_size 32 --federation.accumulate 4 --federation.lr 2e-3"
)


@pytest.mark.shared
def test_a_short_federated_run_on_the_real_encoder(tmp_path):
    config = read_config(
        f"{EXAMPLE} --federation.rounds 2 --federation.local_steps 6 --data.test_limit 200 --method.name fedex "
        f"--output.dir {tmp_path}/run".split()
    )
    prepared = prepare(config)
    assert sum(len(part) for part in prepared.data.train.values()) == 60_614 and len(prepared.data.test) == 200
    summary = execute(prepared)
    records = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    # 12 layers of 384 x 384 at rank 8, and a head of 2 x 384 + 2, in fp32
    factors, head = 12 * 8 * (384 + 384), 2 * 384 + 2
    assert [r["bytes_up"] for r in records] == [3 * 4 * (factors + head)] * 2
    assert [r["bytes_down"] for r in records] == [3 * 4 * (factors + head), 3 * 4 * (3 * factors + head)]
    assert max(r["exactness"] for r in records) < 1e-6 < 1e-3 < max(r["aggregation_error"] for r in records)
    assert summary["trainable_params"] == factors + head

    inputs = AutoTokenizer.from_pretrained(f"{SHARED}/models/minilm-l6")(
        ["a fine film", "dull and long"], padding=True, return_tensors="pt"
    )
    trainer = LocalTrainer(config, "cpu", 1, prepared.data)
    expected = trainer.logits(
        results.global_view(config, results.load_state(tmp_path / "run", config, 2)), dict(inputs)
    )
    base = AutoModelForSequenceClassification.from_pretrained(f"{SHARED}/models/minilm-l6", num_labels=2)
    with torch.no_grad():
        got = PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()(**inputs).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.shared
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fedex_reaches_82_percent_on_sst2_as_the_mean_of_three_seeds(tmp_path):
    finals = []
    for seed in (0, 1, 2):
        flags = (
            f"{EXAMPLE} --federation.rounds 8 --federation.local_steps 30 --federation.evaluate_every 8 "
            f"--method.name fedex --seed {seed}"
        )
        prepared = prepare(read_config(f"{flags} --output.dir {tmp_path}/{seed}".split()))
        assert len(prepared.data.test) == 872
        finals.append(execute(prepared)["final"])
    assert statistics.mean(finals) >= 0.82, finals


@pytest.mark.shared
@pytest.mark.parametrize(
    "source, text, completion",
    [("gsm8k", "question", "answer"), ("e2e/devset.csv", "mr", "ref"), ("commonsense/boolq", "instruction", "output")],
)
def test_real_generation_data_is_read_and_encoded(source, text, completion):
    config = read_config(
        f"--model.path builtin --data.source {SHARED}/data/{source} --data.text {text} --data.completion {completion} "
        "--data.limit 30 "
        "--data.test_limit 20 --data.max_length 512 --federation.clients 3".split()
    )
    prepared = prepare(config)
    trainer = LocalTrainer(config, "cpu", 1, prepared.data)
    examples = trainer.examples("train", "client-0")
    assert len(examples) == 10 and all(len(e.input_ids) <= 512 and any(y >= 0 for y in e.labels) for e in examples)
    assert Path(SHARED).is_dir()
