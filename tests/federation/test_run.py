"""Whole runs: inline against Ray to the last bit, bytes against closed forms, resume, failures, exports."""

import json
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
from peft import PeftModel
from support import (
    ALL,
    EXACT,
    PAIRS,
    PERSONAL,
    final_tensors,
    options,
    rounds,
    run,
    sabotaged,
    same_bits,
    stopped_after_two,
)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedray.config.build import make_method
from fedray.data.partition import load_data
from fedray.errors import ClientError, ConfigError, RoundError
from fedray.federation import results, worker_ray
from fedray.federation.exports import Form, export, folder_name
from fedray.federation.worker import Worker
from fedray.methods import View
from fedray.methods.traffic import simulate
from fedray.training.local import LocalTrainer

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # worker processes cannot import this file


def also(given: dict, **federation) -> dict:
    return given | {"federation": given["federation"] | federation}


MOVES_BASE = {i for i, (_, name, extra) in ALL.items() if name in ("fedex", "flora") or extra.get("residual") == "fold"}
# A whole run on Ray takes seconds to start: four pairs that differ most here, the others marked slow.
OFTEN = ("lora+fra-ffa", "abba+fedex", "lora+fedsa")  # lora-sb on Ray: test_start.py
# A real classifier, head and dropout included.
CLASSIFIED = (
    "lora+fedit",
    "lora+fedex",
    "lora+fra-ffa",
    "lora+fedex-keep",
    "lora+fedask",
    "lora+rolora",
    "abba+fedex",
    "lora-sb+fed-sb",
    "ravan+ravan",
)
RUNS = [(pair, "causal-lm") for pair in ALL] + [(pair, "classification") for pair in CLASSIFIED]


@pytest.fixture(scope="module")
def played(make_config):
    """One inline run a method, made when first asked for."""
    done = {}

    def get(name: str, task: str = "causal-lm"):
        if (name, task) not in done:
            config = make_config(
                task=task, data__partition="dirichlet" if task == "classification" else "iid", **options(name)
            )
            done[name, task] = (config, run(config))
        return done[name, task]

    return get


def effective(folder: Path) -> dict[str, torch.Tensor]:
    """Factors, heads, and the dense base update of each layer (its factors are not unique)."""
    config = results.read_run_config(folder)
    view = results.global_view(config, results.load_state(folder, config, results.classes_of(config)))
    return view.tensors | {name: delta.dense() for name, delta in view.base.items()}


# --- engines ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_inline_and_ray_give_the_same_bytes_in_every_tensor(name, played, make_config, ray_session):
    _, inline = played(name)
    # Two workers in the slow cases and in the first of the others; a second one takes as long to start as the run.
    worker = {"cpus": 1} | ({"count": 1} if name in OFTEN[1:] else {})
    same_bits(inline, run(make_config(engine="ray", worker=worker, **options(name))))


@pytest.mark.parametrize(
    "delays", [[0.4, 0.0, 0.2, 0.1], pytest.param([0.0, 0.3, 0.0, 0.5], marks=pytest.mark.slow)], ids=["one", "other"]
)
def test_the_order_in_which_clients_finish_does_not_matter(make_config, ray_session, monkeypatch, delays):
    """5 clients on 2 workers, each delayed by another time."""
    options = dict(federation__clients=5, federation__cohort=4, federation__keep_optimizer=True, adapter__dropout=0.1)
    inline = run(make_config(**options))

    class Slow(Worker):
        def train(self, client, *args, delays=delays):
            time.sleep(delays[int(client[-1]) % 4])
            return Worker.train(self, client, *args)

    monkeypatch.setattr(worker_ray, "Worker", Slow)
    same_bits(inline, run(make_config(engine="ray", **options)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flora", "flexlora", "hetlora"])
def test_clients_of_different_ranks_give_the_same_bits_on_ray(name, make_config, ray_session):
    given = dict(method__name=name, adapter={"kind": "lora", "rank": [3, 1, 2], "alpha": 4})
    same_bits(run(make_config(**given)), run(make_config(engine="ray", **given)))


@pytest.mark.slow  # the order of clients, above, is asserted on 2 workers against 1 too
def test_a_client_does_not_depend_on_who_else_its_worker_serves(make_config, ray_session):
    same_bits(
        run(make_config(federation__clients=5)),
        run(make_config(engine="ray", worker={"count": 2, "cpus": 1}, federation__clients=5)),
    )


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_zero_stages_and_plain_pytorch_agree_after_three_rounds(task, make_config):
    """With SGD: Adam would magnify the last digit of gradients near zero (see tests/training/test_local.py)."""
    options = {"task": task, "federation__optimizer": "sgd", "federation__lr": 0.1}
    plain = effective(run(make_config(**options, worker={"cpus": 1, "backend": "torch"})))
    for stage in range(4):
        deep = effective(run(make_config(**options, worker={"cpus": 1, "zero_stage": stage})))
        assert max((plain[n] - deep[n]).abs().max().item() for n in plain) < 1e-6


# --- oracles ----------------------------------------------------------------------------------------------------


LINEAR = {
    "lora+ffa": {"method": {"name": "ffa"}, "adapter": {"rank": 2, "alpha": 4}},
    "abba+ffa": {"method": {"name": "ffa"}, "adapter": {"kind": "abba", "rank": 4, "alpha": 16}},
    "lora+rolora": {"method": {"name": "rolora"}, "adapter": {"rank": 2, "alpha": 4}},
    "abba+rolora": {"method": {"name": "rolora"}, "adapter": {"kind": "abba", "rank": 4, "alpha": 16}},
    "lora+fedsvd": {"method": {"name": "fedsvd"}, "adapter": {"rank": 2, "alpha": 4}},
    "lora-sb+fed-sb": {"method": {"name": "fed-sb"}, "adapter": {"kind": "lora-sb", "rank": 3}},
    "ravan+fed-sb": {
        "method": {"name": "fed-sb"},
        "adapter": {"kind": "ravan", "rank": 2},
    },  # RAVAN with its scales held
}


@pytest.mark.parametrize("pair", LINEAR)
def test_one_full_batch_step_of_k_clients_is_one_centralised_step(pair, make_config):
    """Two rounds of one full-batch SGD step each, clients of unequal size, against one client that holds everything."""

    def config(clients, sizes):
        federation = {
            "clients": clients,
            "rounds": 2,
            "local_steps": 1,
            "batch_size": max(sizes.values()),
            "lr": 0.5,
            "optimizer": "sgd",
            "warmup": 0.0,
            "schedule": "constant",
            "max_grad_norm": None,
        }
        return make_config(
            task="classification",
            **LINEAR[pair],
            data__partition="dirichlet" if clients > 1 else "iid",
            model__dropout=0.0,
            federation=federation,
            clients={name: {"batch_size": size} for name, size in sizes.items()},
        )

    sizes = {name: len(part) for name, part in load_data(config(5, {"client-0": 1})).train.items()}
    assert len(set(sizes.values())) > 2
    many, one = run(config(5, sizes)), run(config(1, {"client-0": sum(sizes.values())}))
    apart = [effective(folder) for folder in (many, one)]
    assert all(r["dropped"] == [] for r in rounds(many)) and apart[0].keys() == apart[1].keys()
    worst = max((apart[0][n] - apart[1][n]).abs().max().item() for n in apart[0])
    start = make_method(results.read_run_config(many))
    assert worst < 1e-6
    state = results.load_state(many, results.read_run_config(many), 2)
    before = start.view(state.spec, start.init(state.spec), None).tensors
    assert any((apart[0][n] - t).abs().max() > 1e-3 for n, t in before.items())  # it did learn something


# --- what a round reports ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, task", RUNS)
def test_bytes_are_the_closed_form_and_the_serialised_size(name, task, played):
    config, folder = played(name, task)
    state = results.load_state(folder, config, results.classes_of(config))
    heads = sum(state.tensors[n].numel() for n in state.heads)
    method, names = make_method(config), tuple(f"client-{i}" for i in range(3))
    each = [simulate(method, state.spec, names, name, len(rounds(folder))) for name in names]
    for record in rounds(folder):
        moves = [of_client[record["round"] - 1] for of_client in each]
        assert record["bytes_up"] == sum(4 * (m.up + heads) for m in moves)
        down = sum(4 * (m.down + m.once + heads) for m in moves)
        assert record["bytes_down"] <= down if "florist" in name else record["bytes_down"] == down
    on_disk = sum(len(t.numpy().tobytes()) for n, t in final_tensors(folder).items() if n.startswith("tensors/"))
    assert on_disk == 4 * sum(t.numel() for t in state.tensors.values())  # what the next round would send


def test_a_client_that_missed_rounds_downloads_what_it_missed(make_config):
    folder = run(make_config(federation__clients=5, federation__cohort=2, federation__rounds=6))
    config = results.read_run_config(folder)
    spec = results.load_state(folder, config, 0).spec
    seen, size = dict.fromkeys((f"client-{i}" for i in range(5)), 0), 4 * spec.size()
    for record in rounds(folder):
        done = record["round"] - 1  # increments there are so far, each of (k - 1) r (m + n)
        assert record["bytes_down"] == sum(size + (done - seen[c]) * size for c in record["cohort"])
        seen |= dict.fromkeys(record["cohort"], done)
    assert len({tuple(r["cohort"]) for r in rounds(folder)}) > 1


@pytest.mark.parametrize("name", ALL)
def test_exactness_is_reported_and_small_where_it_is_claimed(name, played):
    linear = ("ffa", "rolora", "fedsvd", "fed-sb", "ravan")
    for record in rounds(played(name)[1]):
        assert record["cohort"] == ["client-0", "client-1", "client-2"]
        if name in PERSONAL:
            assert record["exactness"] is None and len(record["client_metrics"]) == 3
            continue
        exact = name in EXACT or ("fra-ffa" in name and record["round"] > 1) or name == "lora+fedask-wide"
        assert record["exactness"] < 1e-6 if exact and "fedask" not in name else record["exactness"] > 1e-6
        if ALL[name][1] in linear:
            assert record["aggregation_error"] == 0.0
        if ALL[name][1] == "fedit":
            assert record["exactness"] == pytest.approx(record["aggregation_error"], rel=1e-3)


def test_summary_and_run_directory(played):
    config, folder = played("lora+fedex")
    summary = json.loads((folder / "summary.json").read_text())
    records = rounds(folder)
    assert summary["bytes_up"] == sum(r["bytes_up"] for r in records) and summary["rounds"] == len(records) == 3
    assert summary["final"] == records[-1]["metrics"]["bits_per_byte"] < summary["initial"]
    assert summary["trainable_params"] == sum(t.numel() for n, t in final_tensors(folder).items() if "lora_" in n)
    assert {"adapter", "method", "metric", "epsilon", "delta", "seed", "wall_seconds"} <= summary.keys()
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml",
        "rounds.jsonl",
        "summary.json",
        "checkpoint",
        "adapter",
    }
    assert results.read_run_config(folder) == config


def test_evaluation_by_group_and_on_clients(make_config):
    folder = run(
        make_config(
            data__partition="column",
            data__column="author",
            data__client_held_out=0.2,
            federation={"rounds": 2, "local_steps": 2, "batch_size": 4},
        )
    )
    record = rounds(folder)[-1]
    assert list(record["groups"]) == list(record["client_metrics"]) == [f"author-{i}" for i in range(5)]
    assert all(m["bits_per_byte"] > 0 for m in [*record["groups"].values(), *record["client_metrics"].values()])


@pytest.mark.parametrize("name", ["lora+fedsa", "abba+fedsa"])
def test_each_fedsa_client_goes_on_with_its_own_B(name, played):
    """What a round reports of each client is what its exported model gives, and a second round starts from the first
    one's B."""
    config, folder = played(name)
    checkpoint = results.load_checkpoint(folder, config, 0)
    trainer = LocalTrainer(config, "cpu", 1)
    B = checkpoint.state.spec.adapter.pair[0]
    told = rounds(folder)[-1]["client_metrics"]
    seen = {}
    for client, view in results.views(config, checkpoint).items():
        statistics = [s for batch in trainer.evaluate(view, "test", client, (0, 1)) for s in batch]
        assert trainer.task.metrics(statistics) == pytest.approx(told[client], rel=1e-6)
        seen[client] = torch.cat([t.flatten() for n, t in sorted(view.tensors.items()) if n.endswith(B)])
    assert len({round(m["bits_per_byte"], 9) for m in told.values()}) == 3
    assert results.evaluate(folder)["metrics"] == pytest.approx(rounds(folder)[-1]["metrics"], rel=1e-6)
    # A round that forgot B would start again from zero: three rounds' B is longer than the last round's own steps can
    # make it.
    short = make_method(config).view(checkpoint.state.spec, checkpoint.state, None).tensors
    alone = trainer.train(View(short, {}, checkpoint.state.trained), "client-0", 2).tensors
    once = torch.cat([t.flatten() for n, t in sorted(alone.items()) if n.endswith(B)])
    assert seen["client-0"].norm() > 1.5 * once.norm()


def test_clients_named_like_paths_are_exported_below_the_run(make_config, tmp_path):
    source = tmp_path / "d.jsonl"
    names = ("../../evil", "a/b", "..", "ward 7")
    source.write_text(
        "".join(json.dumps({"text": f"text {i} of {names[i % 4]}", "ward": names[i % 4]}) + "\n" for i in range(40))
    )
    federation = {"rounds": 1, "local_steps": 1, "batch_size": 2}
    folder = run(
        make_config(
            data={"source": str(source), "partition": "column", "column": "ward", "max_length": 32},
            federation=federation,
            method__name="fedsa",
        )
    )
    assert sorted(p.name for p in (folder / "adapter").iterdir()) == sorted(map(folder_name, names))
    assert all((folder / "adapter" / folder_name(n) / "adapter_config.json").is_file() for n in names)
    assert folder_name("ward 7") == "ward 7" and not any("/" in folder_name(n) or folder_name(n) == ".." for n in names)


def test_evaluate_every_skips_rounds_but_never_the_last(make_config):
    records = rounds(run(make_config(federation__rounds=4, federation__evaluate_every=3)))
    assert [r["metrics"] is not None for r in records] == [False, False, True, True]


# --- resume -----------------------------------------------------------------------------------------------------


RESUMED = (
    {pair: also(options(pair), local_steps=1) for pair in PAIRS}
    | {"lora+fedex-keep": options("lora+fedex-keep")}
    | {
        "fra-ffa, ZeRO 2, kept": {
            "method__name": "fra-ffa",
            "federation__keep_optimizer": True,
            "worker": {"cpus": 1, "zero_stage": 2},
        },
        "flora, kept": {"federation__keep_optimizer": True, "method__name": "flora"},
        "sgd, kept": {"federation__keep_optimizer": True, "federation__optimizer": "sgd"},
        "ZeRO 3, kept": {"federation__keep_optimizer": True, "worker": {"cpus": 1, "zero_stage": 3}},
        "fedsa, kept": {"federation__keep_optimizer": True, "method__name": "fedsa"},
        "rolora, ZeRO 3": {"method__name": "rolora", "worker": {"cpus": 1, "zero_stage": 3}},
        "fed-sb, yogi": options("lora-sb+fed-sb")
        | {"method": {"name": "fed-sb", "server_optimizer": "yogi", "server_lr": 0.1}},
        "flexlora, ranks": {"method__name": "flexlora", "adapter__rank": [2, 1, 3, 1, 2]},
        "proximal": {"federation__proximal": 0.5},
    }
)


@pytest.mark.parametrize("given", RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_in_the_same_bits(make_config, given, monkeypatch):
    given = {**given, "federation__clients": 5, "federation__cohort": 3, "federation__rounds": 4}
    whole = run(make_config(**given))
    again = stopped_after_two(make_config(**given), monkeypatch)
    resumed = run(again)
    same_bits(whole, resumed)
    assert run(again) == resumed  # finished: a no-op
    same_bits(whole, resumed)


# --- failures ---------------------------------------------------------------------------------------------------


def test_a_failing_client_is_named_with_its_cause(make_config, ray_session, monkeypatch):
    with pytest.raises(ClientError, match=r"client 'client-1' failed: KeyError: 'ward' \(round 2\)") as caught:
        run(sabotaged(make_config, monkeypatch, "raises"))
    assert "Traceback" in caught.value.details and "ray" not in str(caught.value).lower()


# The quorum is the coordinator's, on either engine; that a failure comes through Ray whole is asserted above.
@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_below_the_quorum_the_round_is_retried_then_fails(make_config, monkeypatch, engine, request):
    if engine == "ray":
        request.getfixturevalue("ray_session")
    with pytest.raises(
        RoundError, match=r"round 2: 2 of 3 clients reported and 3 are needed .*client 'client-1': KeyError"
    ):
        run(sabotaged(make_config, monkeypatch, "raises", engine=engine, federation__quorum=0.9))


@pytest.mark.parametrize("engine", ["inline", "ray"])
def test_with_a_quorum_a_failing_client_is_left_out_and_said(make_config, monkeypatch, engine, request):
    if engine == "ray":
        request.getfixturevalue("ray_session")
    folder = run(sabotaged(make_config, monkeypatch, "raises", engine=engine, federation__quorum=0.6))
    assert [r["dropped"] for r in rounds(folder)] == [[], [{"client": "client-1", "reason": "KeyError: 'ward'"}], []]
    assert rounds(folder)[1]["bytes_up"] == rounds(folder)[0]["bytes_up"] * 2 // 3


@pytest.mark.parametrize("kind", ["dies", pytest.param("dies evaluating", marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_is_restarted_and_its_work_repeated_to_the_same_bits(
    make_config, ray_session, monkeypatch, kind
):
    """With kept optimizer states, under ZeRO 1: a fresh worker must take them up too."""
    options = dict(federation__keep_optimizer=True, worker={"cpus": 1, "zero_stage": 1})
    whole = run(make_config(**options))
    folder = run(sabotaged(make_config, monkeypatch, kind, **options))
    assert (folder / "flag").exists()
    a, b = final_tensors(whole), final_tensors(folder)
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_client_past_the_deadline_is_left_out(make_config, ray_session, monkeypatch):
    config = sabotaged(make_config, monkeypatch, "late", federation__deadline=10.0, federation__quorum=0.5)
    folder = run(config)
    assert [[d["client"] for d in r["dropped"]] for r in rounds(folder)] == [[], ["client-1"], []]


# Words of a failure through Ray: `test_a_failing_client_is_named_with_its_cause`.
@pytest.mark.parametrize("engine", ["inline", pytest.param("ray", marks=pytest.mark.slow)])
def test_a_real_error_on_a_client_reaches_the_person(make_config, engine, request):
    """One client's own learning rate makes its loss overflow; its name, the cause and the fix come out."""
    if engine == "ray":
        request.getfixturevalue("ray_session")
    config = make_config(
        engine=engine,
        worker={"cpus": 1, "count": 1},
        federation__max_grad_norm=None,
        clients={"client-2": {"lr": 1e30}},
    )
    with pytest.raises(
        ClientError,
        match=r"client 'client-2' failed: the loss became \w+ at local step 2 of round 1: lower federation.lr",
    ):
        run(config)


def test_no_actor_or_placement_group_is_left_behind(ray_session):
    """After all the runs above, those that failed included."""
    from ray.util import placement_group_table

    assert all(g["state"] == "REMOVED" for g in placement_group_table().values())
    deadline = time.monotonic() + 10
    while ray_session.available_resources().get("CPU") != 2.0 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray_session.available_resources()["CPU"] == 2.0


# --- exports ----------------------------------------------------------------------------------------------------

INPUTS = {
    "input_ids": torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(5)),
    "attention_mask": torch.ones(3, 11, dtype=torch.long),
}
CLASSES = {"causal-lm": AutoModelForCausalLM, "classification": AutoModelForSequenceClassification}


@pytest.mark.parametrize("name, task", RUNS)
def test_the_adapter_loads_in_plain_peft_and_gives_the_same_logits(name, task, played, tmp_path):
    config, folder = played(name, task)
    trainer = LocalTrainer(config, "cpu", 1)
    views = results.views(config, results.load_checkpoint(folder, config, len(trainer.data.classes)))
    assert list(views) == ([None] if name not in PERSONAL else ["client-0", "client-1", "client-2"])
    export(folder, tmp_path / "merged", Form("merged"))
    logits = {}
    for client, view in views.items():
        place = "" if client is None else client
        expected = logits[client] = trainer.logits(view, INPUTS)
        base = CLASSES[task].from_pretrained(config.model.path)
        before = base.eval()(**INPUTS).logits.detach()
        with torch.no_grad():
            got = PeftModel.from_pretrained(base, folder / "adapter" / place).eval()(**INPUTS).logits
            merged = CLASSES[task].from_pretrained(tmp_path / "merged" / place).eval()(**INPUTS).logits
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
        assert (got - before).abs().max() > 1e-3
    if name in PERSONAL:
        assert (logits["client-0"] - logits["client-1"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_export_lora_refuses_an_adapter_that_alone_is_wrong(name, played, tmp_path):
    config, folder = played(name)
    if name in MOVES_BASE:
        with pytest.raises(
            ConfigError, match=f"moved the base, so its rank-{config.adapter.rank} adapter alone is wrong"
        ):
            export(folder, tmp_path / "lora", Form("lora"))
        assert not (tmp_path / "lora").exists()
    else:
        export(folder, tmp_path / "lora", Form("lora"))
        place = tmp_path / "lora" / ("client-0" if name in PERSONAL else "")
        rank = {"lora": 2, "lora-sb": 2, "abba": 2 * 2, "ravan": 4 * 2}[config.adapter.kind]
        assert json.loads((place / "adapter_config.json").read_text())["r"] == rank


def test_evaluate_repeats_the_last_rounds_metrics(played):
    _, folder = played("lora+fedex")
    assert results.evaluate(folder)["metrics"] == pytest.approx(rounds(folder)[-1]["metrics"], rel=1e-5)


def test_a_run_by_column_can_be_read_back(make_config, tmp_path):
    """Its config is written with every key, and the number of clients is the column's."""
    source = tmp_path / "d.jsonl"
    source.write_text(
        "".join(json.dumps({"text": f"text {i} of ward {i % 4}", "ward": i % 4}) + "\n" for i in range(40))
    )
    federation = {"rounds": 1, "local_steps": 1, "batch_size": 2}
    config = make_config(
        data={"source": str(source), "partition": "column", "column": "ward", "max_length": 32}, federation=federation
    )
    folder = run(config)
    again = results.read_run_config(folder)
    assert again == config and results.evaluate(folder)["groups"].keys() <= {"0", "1", "2", "3"}
    wall = json.loads((folder / "summary.json").read_text())["wall_seconds"]
    run(again.model_copy(update={"output": again.output.model_copy(update={"resume": True})}))
    assert json.loads((folder / "summary.json").read_text())["wall_seconds"] == wall


def test_exports_refuse_bad_targets(played, tmp_path):
    _, folder = played("lora+fedit")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        export(folder, tmp_path / "full", Form("peft"))
    with pytest.raises(ConfigError, match="--format 'onnx' is not known"):
        export(folder, tmp_path / "new", Form("onnx"))
    with pytest.raises(ConfigError, match="is no run directory"):
        export(tmp_path, tmp_path / "new", Form("peft"))
