"""What a result is written as: an adapter of one rank, the card, and the way to the hub."""

import json
import math
import re
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hub import TOKEN, fedray, serving
from huggingface_hub import HfApi
from peft import PeftModel
from support import options, run, trainer_and_view
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from fedray.data.tasks import TASKS
from fedray.errors import ConfigError
from fedray.federation import exports, results
from fedray.federation.card import About, _at_most, card, is_hub_id
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


@pytest.mark.parametrize("rank", [None, 3])
def test_an_adapter_for_llama_cpp_is_the_same_change_of_its_own_layout(rank, fedex, tmp_path):
    """The oracle is transformers' own reader of GGUF, which brings rows back to the layout of its models."""
    config, folder = fedex
    export(folder, tmp_path / "out", Form("gguf", rank))
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: np.array(t.data) for t in reader.tensors}
    state, base = results.load_state(folder, config, 0), AutoModelForCausalLM.from_pretrained(config.model.path)
    one = {a.shape[0] for name, a in tensors.items() if name.endswith("lora_a")}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora" and len(one) == 1
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == one.pop()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, base.config.num_hidden_layers)
    view = results.global_view(config, state)
    back = LlamaTensorProcessor(base.config.to_dict())
    for layer in state.spec.layers:
        place = f"{names.get_name(layer.name)}.weight"
        delta = back.process(tensors[f"{place}.lora_b"] @ tensors[f"{place}.lora_a"], place).weights
        factors = {f: view.tensors[f"{layer.name}.{f}"].double() for f in ("lora_A", "lora_B")}
        dense = layer.scale * factors["lora_B"] @ factors["lora_A"] + view.base[layer.name].dense().double()
        if rank is not None:
            U, S, Vt = torch.linalg.svd(dense)
            dense = (U[:, :rank] * S[:rank]) @ Vt[:rank]
        torch.testing.assert_close(torch.tensor(delta).double(), dense, rtol=1e-5, atol=1e-7)
    assert len(tensors) == 2 * len(state.spec.layers)


def test_what_a_capped_adapter_has_no_place_for(make_config, fedex, tmp_path):
    for form in ("lora", "merged"):
        with pytest.raises(ConfigError, match=f"write --format peft or gguf, not {form}"):
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
        secret = str(Path(config_of(folder).model.path).parent).encode()
        assert not any(secret in data for data in there.values())  # no path of this machine
        hub.repositories["models/org/open"] = {}
        words[1], words[5] = str(tmp_path / "open"), "org/open"
        said, code = fedray("export", hub, tmp_path / "home", *words, HF_TOKEN=TOKEN)
        assert code == 2 and "org/open is there and public" in said and not hub.repositories["models/org/open"]
        words[1], words[5] = str(tmp_path / "again"), "org/notes-lora"
        said, code = fedray("export", hub, tmp_path / "home", *words, HF_TOKEN="another")
        assert code == 2 and "set HF_TOKEN to a token that may write" in said and "Traceback" not in said
        assert (tmp_path / "again" / "adapter_config.json").is_file()


def test_what_cannot_be_pushed(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="a model for each client"):
        exports.push(tmp_path, "a/b", private=False)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(exports, "HfApi", partial(HfApi, endpoint="http://127.0.0.1:9", token=TOKEN))
    with pytest.raises(ConfigError, match="did not take it: .*go on by: hf upload a/b"):
        exports.push(tmp_path, "a/b", private=False)
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        exports.push(tmp_path, "a/b/c", private=False)


def config_of(folder):
    return results.read_run_config(folder)


def about(config, folder, **changes):
    given = {"records": results.read_rounds(folder), "result": 3, "statement": None, "format": "peft"} | changes
    return About(config, **given)


def test_a_card_of_a_round_without_metrics_says_so(fedex):
    config, folder = fedex
    unmeasured = [{**r, "metrics": None} for r in results.read_rounds(folder)]
    text = card(about(config, folder, records=unmeasured))
    assert "was not measured on held-out examples" in text and "exactness, largest of all rounds" in text


def test_a_card_keeps_clients_names_and_paths_at_home(make_config, fedex):
    config = make_config(adapter={"rank": {"St Mary": 4, "Ward 7": 2}, "alpha": 8}, **SOURCES)
    text = card(about(config, fedex[1]))
    assert "rank 2, 4" in text and "| clients | 2, data by" in text
    assert not any(name in text for name in ("Mary", "Ward", "secret"))
    assert not is_hub_id("patients/oncology-smith.csv") and is_hub_id("org/notes") and is_hub_id("gpt2")


SOURCES = {
    "clients": {name: {"source": f"/data/secret/{i}.jsonl"} for i, name in enumerate(("St Mary", "Ward 7"))},
    "federation": {"rounds": 3},
    "method": {"name": "flexlora"},
}


ROUNDED = [(2.98149, "2.982"), (3.0, "3"), (1e-6, "1e-06"), (0.99999, "1"), (7.999, "7.999")]


@pytest.mark.parametrize("number, said", ROUNDED)
def test_a_guarantee_is_never_stated_smaller(number, said):
    assert _at_most(number) == said and float(said) >= number


@pytest.mark.parametrize("given", [{"task": "classification"}, {"model__quantise": "nf4", "model__base_rank": 1}])
def test_what_the_card_says_to_load_it_gives_the_measured_model(given, make_config):
    """Also of a base in 4 bits whose update the rank has cut."""
    config = make_config(method__name="fedex", **given)
    folder = run(config)
    classes = results.classes_of(config)
    text = (folder / "adapter" / "README.md").read_text()
    code = re.search("```python\\n(.*?)\\n```", text, re.DOTALL)[1]
    name = Path(config.model.path).name
    place = {}
    exec(code.replace(f'"{name}"', f'"{config.model.path}"').replace("PATH", str(folder / "adapter")), place)
    trainer, _ = trainer_and_view(config)
    expected = trainer.logits(results.global_view(config, results.load_state(folder, config, classes)), INPUTS)
    # In training mode, where nothing is drawn: out of it bitsandbytes repacks layers, and fails on narrow ones.
    model = place["model"].train(config.model.quantise is not None)
    with torch.no_grad():
        torch.testing.assert_close(model(**INPUTS).logits, expected, rtol=1e-4, atol=1e-4)
