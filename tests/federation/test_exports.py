"""What a result is written as: an adapter of one rank, the card, and the way to the hub."""

import json
import math
import re

import pytest
import torch
from hub import TOKEN, fedray, serving
from peft import PeftModel
from support import options, run
from transformers import AutoModelForCausalLM

from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation import exports, results
from fedray.federation.exports import Form, export

INPUTS = {"input_ids": torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(5))}


@pytest.fixture(scope="module")
def fedex(make_config):
    config = make_config(**options("lora+fedex"))
    return config, run(config)


def logits(config, adapter):
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(**INPUTS).logits


@pytest.mark.parametrize("rank", [1, 3, 64])
def test_a_capped_adapter_is_the_best_of_its_rank_and_says_what_it_lost(rank, fedex, tmp_path):
    config, folder = fedex
    (sentence,) = export(folder, tmp_path / "out", Form("peft", rank))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not written["rank_pattern"] and not written["modules_to_save"] and written["r"] <= rank
    assert written["lora_alpha"] == written["r"]

    view = results.global_view(config, results.load_state(folder, config, 0))
    state = results.load_state(folder, config, 0)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    modules, kept, whole = dict(base.named_modules()), [], []
    for layer in state.spec.layers:
        factors = {f: view.tensors[f"{layer.name}.{f}"].double() for f in ("lora_A", "lora_B")}
        dense = layer.scale * factors["lora_B"] @ factors["lora_A"] + view.base[layer.name].dense().double()
        U, S, Vt = torch.linalg.svd(dense, full_matrices=False)
        kept.append(S[:rank].square().sum())
        whole.append(S.square().sum())
        with torch.no_grad():
            modules[layer.name].weight += ((U[:, :rank] * S[:rank]) @ Vt[:rank]).float()
    with torch.no_grad():
        torch.testing.assert_close(logits(config, tmp_path / "out"), base.eval()(**INPUTS).logits, rtol=1e-5, atol=1e-5)
    lost = math.sqrt(max(0.0, 1 - (sum(kept) / sum(whole)).item()))
    said = float(re.search(r"leaves out ([\d.e-]+) of", sentence)[1])
    assert said == pytest.approx(lost, rel=0.06, abs=1e-6)  # of two digits
    assert sentence in (tmp_path / "out" / "README.md").read_text()


def test_what_a_capped_adapter_has_no_place_for(make_config, fedex, tmp_path):
    for form in ("lora", "merged"):
        with pytest.raises(ConfigError, match=f"write --format peft, not {form}"):
            Form(form, 4)
    with pytest.raises(ConfigError, match="no rank"):
        Form("peft", 0)
    folder = run(make_config(task="classification", **options("lora+fedit")))
    with pytest.raises(ConfigError, match=r"trained .*classifier.* beside the adapter"):
        export(folder, tmp_path / "out", Form("peft", 4))


def test_the_card_says_what_privacy_json_says_and_no_path(make_config, tmp_path):
    config = make_config(privacy={"epsilon": 4.0}, **options("lora+ffa"))
    folder = run(config)
    guarantee = json.loads((folder / "privacy.json").read_text())["guarantee"]
    for place, form in ((folder / "adapter", None), (tmp_path / "out", Form("merged"))):
        if form is not None:
            export(folder, place, form)
        text = (place / "README.md").read_text()
        assert text.startswith("---\n") and "differential-privacy" in text.split("---")[1]
        assert str(config.model.path) not in text and str(config.data.source) not in text
        assert guarantee["void"] in text  # of the tests' fixed key
        for name in ("what_a_unit_is", "trust", "accountant"):
            assert " ".join(guarantee[name].split()) in text
        assert f"{guarantee['delta']:.3g}" in text and "| method | ffa" in text
    assert "library_name: transformers" in text


def test_the_card_of_a_run_without_privacy_promises_none(fedex):
    text = (fedex[1] / "adapter" / "README.md").read_text()
    assert "None is guaranteed" in text and "differential-privacy" not in text
    last = json.loads((fedex[1] / "rounds.jsonl").read_text().splitlines()[-1])
    metric = TASKS[fedex[0].model.task].metric
    assert f"| {metric} on held-out examples | {last['metrics'][metric]:.4g} |" in text


def test_an_export_goes_to_the_hub_and_comes_back(fedex, tmp_path):
    folder = fedex[1]
    with serving() as hub:
        words = [str(folder), str(tmp_path / "out"), "--max-rank", "3", "--push", "org/notes-lora", "--private"]
        said, code = fedray("export", hub, tmp_path / "home", *words, HF_TOKEN=TOKEN)
        assert code == 0 and f"sent to {hub.address}/org/notes-lora" in said, said
        there = hub.repositories["models/org/notes-lora"]
        assert {n: there[n] for n in ("adapter_config.json", "adapter_model.safetensors", "README.md")} == {
            p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()
        }
        assert hub.private == {"models/org/notes-lora"} and len(hub.commits) == 1
        words[1] = str(tmp_path / "again")
        said, code = fedray("export", hub, tmp_path / "home", *words, HF_TOKEN="another")
        assert code == 2 and "set HF_TOKEN to a token that may write" in said and "Traceback" not in said
        assert (tmp_path / "again" / "adapter_config.json").is_file()


def test_no_name_of_a_repository(tmp_path):
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        exports.push(tmp_path, "a/b/c", private=False)
