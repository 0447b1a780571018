"""The best round and patience, on validation data; a checkpoint that cannot be written."""

import dataclasses
import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support import rounds, run, same_bits

from fedray.config.read import from_dict
from fedray.errors import ConfigError, RoundError
from fedray.federation import checkpoint, results
from fedray.federation import round as rounding
from fedray.federation.best import out_of_patience, result_of, round_to_keep
from fedray.federation.evaluation import evaluate
from fedray.federation.listening import Silent
from fedray.federation.prepare import prepare
from fedray.federation.run import execute

VALIDATION = {"federation__best_round": True}


def config_of(make_config, tiny, **options):
    data = {"source": str(tiny / "text.jsonl"), "max_length": 48, "evaluate_on": "validation"}
    return make_config(data=data, **options)


def told(monkeypatch, values):
    """Bits per byte of each evaluation, the one before round 1 first."""
    numbers = iter(values)

    def fake(server):
        found = evaluate(server)
        return dataclasses.replace(found, metrics=found.metrics | {"bits_per_byte": next(numbers)})

    monkeypatch.setattr(rounding, "evaluate", fake)


def records_of(values):
    return [{"round": i, "metrics": None if v is None else {"bits_per_byte": v}} for i, v in enumerate(values)]


@given(
    values=st.lists(st.one_of(st.none(), st.floats(0.5, 9.0), st.just(float("nan"))), max_size=12),
    patience=st.integers(1, 4),
)
def test_the_rules_agree_with_their_definitions(values, patience):
    federation = {"best_round": True, "patience": patience}
    config = from_dict({"federation": federation, "data": {"evaluate_on": "validation"}})
    records = records_of([5.0, *values])
    evaluated = [(i, v) for i, v in enumerate([5.0, *values]) if i and v is not None]
    best = min(evaluated, key=lambda pair: (float("inf") if pair[1] != pair[1] else pair[1], pair[0]), default=None)
    assert round_to_keep(config, records) == (best and best[0])
    since = len([i for i, _ in evaluated if best is not None and i > best[0]])
    words = out_of_patience(config, records)
    assert (words is not None) == (since >= patience)
    if words:
        assert f"round {best[0]}'s" in words and f"in {since} evaluation" in words
    last = config.model_copy(update={"federation": config.federation.model_copy(update={"best_round": False})})
    found = result_of(last, records)
    assert (found and found["round"]) == (evaluated[-1][0] if evaluated else None)
    assert round_to_keep(last, records) is None


def test_the_best_rounds_state_is_the_result_and_its_checkpoint_stays(make_config, tiny, monkeypatch):
    """Of five rounds the second is the best: adapter, summary and what evaluation reads are its."""
    two = run(config_of(make_config, tiny, federation__rounds=2, federation__schedule="constant"))
    told(monkeypatch, [3.0, 2.0, 2.5, 2.6, 2.7])
    options = dict(federation__rounds=5, federation__schedule="constant", **VALIDATION)
    folder = run(config_of(make_config, tiny, **options))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["result_round"] == 2 and summary["final"] == 2.0 and summary["rounds"] == 5
    assert {p.name for p in (folder / "checkpoint").iterdir()} == {"round-00002", "round-00004", "round-00005"}
    files = [load_file(f / "adapter" / "adapter_model.safetensors") for f in (two, folder)]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    config = results.read_run_config(folder)
    assert results.load_state(folder, config, 0).round == 2


def test_patience_ends_the_run_with_its_reason(make_config, tiny, monkeypatch):
    told(monkeypatch, [3.0, 2.0, 2.5, 2.0, 1.0])
    folder = run(config_of(make_config, tiny, federation__rounds=6, federation__patience=2))
    records = rounds(folder)
    assert [r["round"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["stopped"].startswith("bits_per_byte has not been better than round 2's 2 in 2 evaluations")
    assert json.loads((folder / "summary.json").read_text())["result_round"] == 4  # patience alone gives the last


def test_a_run_that_is_resumed_finds_the_same_best_round(make_config, tiny):
    options = dict(federation__rounds=4, federation__lr=0.3, **VALIDATION)
    whole, config = run(config_of(make_config, tiny, **options)), config_of(make_config, tiny, **options)

    class Cut(Silent):
        def round(self, record):
            if record["round"] == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(prepare(config), Cut())
    run(config.model_copy(update={"output": config.output.model_copy(update={"resume": True})}))
    same_bits(whole, Path(config.output.dir))
    one, other = (json.loads((f / "summary.json").read_text()) for f in (whole, Path(config.output.dir)))
    assert one["result_round"] == other["result_round"] and one["final"] == other["final"]


@pytest.mark.parametrize("option", [{"federation__patience": 2}, {"federation__best_round": True}])
def test_a_choice_by_the_test_split_is_refused(make_config, option):
    with pytest.raises((ConfigError, ValueError), match="give data.evaluate_on validation"):
        make_config(**option)


def test_a_full_disk_leaves_the_previous_checkpoint_and_says_so(make_config):
    """Files may not grow beyond a few bytes, as on a disk that is full; then there is room again."""
    folder = run(make_config(federation__rounds=2))
    config = results.read_run_config(folder)
    last = results.load_checkpoint(folder, config, 0)
    place = folder / "checkpoint"
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    following = checkpoint.Checkpoint(last.state.replace(round=3), last.seen, records=last.records)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, limit[1]))
    try:
        with pytest.raises(RoundError, match=r"round 3 could not be written .* is whole is round-00002; make room"):
            checkpoint.save(place, following)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before
    checkpoint.save(place, following)
    assert checkpoint.latest(place, last.state.spec).state.round == 3


def test_a_run_on_a_full_disk_ends_with_a_sentence_and_goes_on_where_there_is_room(make_config, monkeypatch):
    options = dict(federation__rounds=3)
    whole, config = run(make_config(**options)), make_config(**options)
    real = checkpoint._write

    def full(part, saved):
        if saved.state.round == 2:
            part.mkdir()
            (part / "tensors.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(part, saved)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(RoundError, match=r"\(No space left on device\).*round-00001"):
        run(config)
    assert [p.name for p in (Path(config.output.dir) / "checkpoint").iterdir()] == ["round-00001"]
    monkeypatch.setattr(checkpoint, "_write", real)
    run(config.model_copy(update={"output": config.output.model_copy(update={"resume": True})}))
    same_bits(whole, Path(config.output.dir))
