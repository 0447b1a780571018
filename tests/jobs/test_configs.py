"""The ready configs: each is what the schema takes, is read, and is planned at the shape of its model."""

from __future__ import annotations

import json
import subprocess

import jsonschema
import pytest
import yaml
from support import ROOT, SCRIPTS
from transformers import GPT2Config, RobertaConfig

from fedray.config.read import from_dict
from fedray.config.schema import schema
from fedray.plan import plan

CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
#: What stands for a model that is on the hub: a shape that ships with fedray, or its own config.
STANDS_FOR = {
    "mistralai/Mistral-7B-v0.1": "mistral-7b",
    "mistralai/Mistral-7B-v0.3": "mistral-7b",
    "meta-llama/Llama-3.2-3B": "llama-3.2-3b",
    "meta-llama/Llama-3.2-1B-Instruct": "llama-3.2-1b",
    "gpt2": GPT2Config(),
    "FacebookAI/roberta-base": RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_ready_config_is_valid_and_planned(file, tmp_path):
    values = yaml.safe_load(file.read_text())
    jsonschema.validate(values, schema())
    config = from_dict(values)
    stand_in = STANDS_FOR[config.model.path]
    if not isinstance(stand_in, str):
        stand_in.save_pretrained(tmp_path)
        stand_in = str(tmp_path)
    planned = plan(from_dict({**values, "model": {**values["model"], "path": stand_in}}))
    assert planned.costs[0].method == config.method.name and planned.costs[0].trainable > 0
    assert planned.memory.activations > 0


def test_numbers_that_the_papers_give():
    """Fed-SB's r = 200 on Mistral-7B: 32 layers of 7 cores of 200 x 200."""
    values = yaml.safe_load((ROOT / "jobs" / "configs" / "metamathqa-mistral-7b-fed-sb.yaml").read_text())
    planned = plan(from_dict({**values, "model": {**values["model"], "path": "mistral-7b"}}))
    assert planned.costs[0].trainable == 32 * 7 * 200 * 200


def test_the_schema_says_what_every_key_is_and_refuses_what_there_is_not():
    said = subprocess.run([SCRIPTS / "fedray", "schema"], capture_output=True, text=True, check=True, timeout=60)
    found = json.loads(said.stdout)
    assert found == json.loads(json.dumps(schema()))
    for section in found["$defs"].values():
        assert all(key.get("description") for key in section["properties"].values()), section["title"]
    for bad in (
        {"method": {"name": "fedx"}},
        {"federation": {"round": 3}},
        {"federation": {"rounds": 0}},
        {"model": {"task": "poetry"}},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, found)
