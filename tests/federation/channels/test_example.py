"""Example-level privacy: whose noise, charged how often, and what a client refuses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from private_runs import CLIENTS, PRIVATE, key_file, killed_after, known, ledger, resumed
from support import final_tensors, rounds, run

from fedray.errors import ClientError, PrivacyError, RoundError
from fedray.federation import pool_inline
from fedray.federation.channels.example import ExampleLevel, NoisedCount
from fedray.federation.prepare import prepare
from fedray.federation.questions import DenseGradient, RangeSketch, RowSketch
from fedray.federation.wire import pack
from fedray.privacy.accountant import epsilon
from fedray.privacy.keys import TEST_KEY
from fedray.privacy.plan import calibrate
from fedray.training.local import LocalTrainer


def test_a_key_that_is_lost_in_a_round_is_charged_for_another_draw(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    config = make_config(method__name="ffa", privacy={"noise": 1.0})
    real, lost = pool_inline.InlinePool.train, []

    def loses(self, handle, round, clients, *args):
        if round == 1 and not lost:  # after the charge, before the work
            lost.append(self.worker.side.keys.folder)
            for path in lost[0].rglob(key_file("client-1")):
                path.unlink()
        return real(self, handle, round, clients, *args)

    monkeypatch.setattr(pool_inline.InlinePool, "train", loses)
    folder = run(config)
    entries = ledger(folder).entries
    assert [e.round for e in entries["client-0"]] == [0, 1, 2, 3] and [e.round for e in entries["client-1"]] == [
        0,
        1,
        2,
        2,
        3,
    ]
    assert len({e.draw for e in entries["client-1"]}) == 5
    last = rounds(folder)[-1]
    once = epsilon([e.release for e in entries["client-1"][:3] + entries["client-1"][4:]], ledger(folder).delta)
    assert last["epsilon"]["client-1"] == ledger(folder).epsilon("client-1") > once and not last["dropped"]
    assert not any(list(lost[0].rglob(key_file(c))) for c in CLIENTS)  # no key outlives the run


def test_a_client_that_cannot_pay_for_another_draw_is_left_out(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    config = make_config(method__name="ffa", privacy={"epsilon": 3.0}, federation__quorum=0.6)
    real, done = pool_inline.InlinePool.train, []

    def loses(self, handle, round, clients, *args):
        if round == 2 and not done:
            done.extend(path.unlink() for path in self.worker.side.keys.folder.rglob(key_file("client-1")))
        return real(self, handle, round, clients, *args)

    monkeypatch.setattr(pool_inline.InlinePool, "train", loses)
    folder = run(config)
    assert [d["client"] for d in rounds(folder)[2]["dropped"]] == ["client-1"] and "budget" in rounds(folder)[2][
        "dropped"
    ][0]["reason"]
    assert max(rounds(folder)[-1]["epsilon"].values()) <= 3.0


def test_two_runs_have_different_noise_and_real_keys_survive_a_kill(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    given = dict(method__name="ffa", privacy={"epsilon": 3.0}, federation__rounds=3)
    one, config = run(make_config(**given)), make_config(**given)
    killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    before = rounds(Path(config.output.dir))
    two = run(resumed(config))
    a, b = final_tensors(one), final_tensors(two)
    assert all(not torch.equal(a[n], b[n]) for n in a if n.endswith("lora_B"))
    assert known(rounds(two)[:2]) == known(before) and {len(e) for e in ledger(two).entries.values()} == {4}
    assert json.loads((two / "privacy.json").read_text())["guarantee"]["void"] is None


def test_a_run_with_more_rounds_than_its_epsilon_allows_stops_every_client_in_time(make_config, capsys):
    config = make_config(
        method__name="ffa",
        privacy={"epsilon": 2.2, "noise": 0.9, "count_noise": 5.0},
        federation__rounds=40,
        federation__evaluate_every=50,
    )
    folder = run(config)
    done = rounds(folder)
    assert 2 < len(done) < 40
    assert (
        max(done[-1]["epsilon"].values()) <= 2.2
        and "budget of epsilon 2.2" in done[-1]["stopped"]
        and done[-1]["metrics"]
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == len(done) and summary["epsilon"] <= 2.2 and (folder / "adapter").is_dir()
    books = ledger(folder)
    for client in CLIENTS:  # nobody could have paid for one more
        assert books.epsilon(client, [books.plans[client].release(2)]) > 2.2 >= books.epsilon(client)
    assert run(resumed(config)) == folder and known(rounds(folder)) == known(done)


def test_a_client_whose_budget_is_spent_first_is_left_out_before_it_trains_and_the_others_go_on(
    make_config, monkeypatch
):
    trained = []
    real = LocalTrainer.train
    monkeypatch.setattr(
        LocalTrainer,
        "train",
        lambda self, view, client, *args: trained.append(client) or real(self, view, client, *args),
    )
    clients = {"client-1": {"batch_size": 16}, "client-0": {}, "client-2": {}}
    folder = run(
        make_config(
            method__name="ffa",
            privacy={"epsilon": 4.0, "noise": 0.95, "count_noise": 5.0},
            clients=clients,
            federation__rounds=8,
        )
    )
    done = rounds(folder)
    out = [r["round"] for r in done if "client-1" not in r["cohort"]]
    assert out and out == list(range(out[0], done[-1]["round"] + 1)) and out[0] > 1
    assert all(
        r["dropped"][0]["client"] == "client-1" and "budget of epsilon 4" in r["dropped"][0]["reason"]
        for r in done
        if r["round"] in out
    )
    assert trained.count("client-1") == out[0] - 1 < trained.count("client-0")
    assert all(e <= 4.0 for r in done for e in r["epsilon"].values())


def test_a_loss_that_is_not_finite_reaches_nobody(make_config):
    config = make_config(privacy={"noise": 1.0}, clients={"client-2": {"lr": 1e30, "local_steps": 5, "batch_size": 12}})
    with pytest.raises(
        ClientError, match="client 'client-2' failed: its update has norm .*: lower its learning rate"
    ) as caught:
        run(config)
    assert not caught.value.details
    assert not rounds(Path(config.output.dir)) if (Path(config.output.dir) / "rounds.jsonl").exists() else True


def test_a_client_does_not_follow_orders_that_its_own_config_does_not_allow(make_config, monkeypatch):
    for change in ({"noise": 0.3}, {"clip": 50.0}, {"rate": 1.0}):

        def generous(self, call, clients, real=ExampleLevel.orders, change=change):
            orders, refused = real(self, call, clients)
            return {c: dataclasses.replace(o, **change) for c, o in orders.items()}, refused

        with monkeypatch.context() as patch:
            patch.setattr(ExampleLevel, "orders", generous)
            with pytest.raises(RoundError, match="the coordinator ordered .* it sends nothing"):
                run(make_config(method__name="ffa", privacy={"epsilon": 3.0, "count_noise": 2.0}))
    subspace = {"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"}}
    for privacy, change in (
        ({"epsilon": 3.0}, {"noise": 0.5}),
        ({"noise": 1.0}, {"noise": 0.5}),
        ({"epsilon": 3.0}, {"clip": 2.0}),
        ({"epsilon": 3.0}, {"rate": 1.1}),
    ):

        def generous_start(self, *question, real=ExampleLevel._sketch_orders, change=change):
            return {c: dataclasses.replace(o, **change) for c, o in real(self, *question).items()}

        with monkeypatch.context() as patch:
            patch.setattr(ExampleLevel, "_sketch_orders", generous_start)
            with pytest.raises(ClientError, match="the coordinator ordered .* it sends nothing"):
                run(make_config(**subspace, privacy=privacy | {"count_noise": 2.0}))

    # Noise that would be enough if the bases had cost nothing is not enough after them.
    def as_if_free(self, call, clients, real=ExampleLevel.orders):
        orders, refused = real(self, call, clients)
        plan = self.ledger.plans["client-0"]
        noise = calibrate(plan.rate, plan.steps, plan.delta, plan.budget, [r for r in plan.before if r.what == "count"])
        assert noise < plan.noise
        return {c: dataclasses.replace(o, noise=noise) for c, o in orders.items()}, refused

    with monkeypatch.context() as patch:
        patch.setattr(ExampleLevel, "orders", as_if_free)
        with pytest.raises(
            RoundError,
            match="the coordinator ordered noise with which the run would spend epsilon .* of 3: it sends nothing",
        ):
            run(make_config(**subspace, privacy={"epsilon": 3.0, "count_noise": 2.0, "subspace_fraction": 0.5}))


def test_a_client_answers_no_question_that_a_private_run_does_not_have(make_config):
    from fedray.federation.worker import Worker

    for private, adapter in (
        ({"noise": 1.0}, {"kind": "lora-sb", "rank": 2}),
        ({"noise": 1.0, "unit": "client", "delta": 0.1}, {"kind": "lora-sb", "rank": 2}),
    ):
        worker = Worker(make_config(method__name="fed-sb", adapter=adapter, privacy=private), "cpu", 1)
        layers = tuple(x.name for x in worker.trainer.layers)
        for question in (DenseGradient(layers, 4), RangeSketch(None, 4), RowSketch(pack({}), 4)):
            packet, _, failure = worker.ask("client-0", question, None)
            assert packet is None and "which this run keeps private: it sends nothing" in failure.cause
        for part in ("train", "held-out"):
            with pytest.raises(PrivacyError, match=f"metrics of {part} examples"):
                worker.evaluate(part, "client-0", (0, 1), None, None, None)


def test_a_key_lost_during_the_start_ends_the_run_since_others_have_answered(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    config = make_config(**PRIVATE["fed-sb, private subspace"] | {"privacy": {"noise": 1.0}})
    real, lost = pool_inline.InlinePool.ask, []

    def loses(self, question, clients, *args):
        if isinstance(question, RowSketch) and not lost:
            lost.extend(path.unlink() for path in self.worker.side.keys.folder.rglob(key_file("client-1")))
        return real(self, question, clients, *args)

    monkeypatch.setattr(pool_inline.InlinePool, "ask", loses)
    with pytest.raises(ClientError, match="client 'client-1' failed: its noise key was lost"):
        run(config)
    # Other columns of client-1 give another Q, and of rows the others would answer from other inputs than before.
    with pytest.raises(
        ClientError, match="'client-0' failed: .* asked for subspace ROWS a second time, .* another run"
    ):
        run(resumed(config))
    entries = ledger(Path(config.output.dir)).entries
    subspaces = {c: [e.draw for e in es if e.release.what == "subspace"] for c, es in entries.items()}
    # What the coordinator has asked for is charged before it is refused, and the other key's columns are a release.
    assert [len(set(subspaces[c])) for c in CLIENTS] == [len(subspaces[c]) for c in CLIENTS] == [3, 4, 3]
    assert all(e.release.steps == 1 for es in entries.values() for e in es if e.release.what == "subspace")


def test_data_that_changed_before_a_run_goes_on_never_meet_the_same_noise(make_config, tiny, tmp_path, monkeypatch):
    """The same noise on two data sets would show their difference bare."""
    monkeypatch.delenv(TEST_KEY)
    source = tmp_path / "d.csv"
    rows = (tiny / "classes.csv").read_text().splitlines()
    source.write_text("\n".join(rows))
    config = make_config(
        task="classification",
        data={"source": str(source), "max_length": 48},
        method__name="ffa",
        privacy={"noise": 1.0},
    )

    def dies(self, call, clients, real=ExampleLevel.orders):  # after the round is charged, before its answer is kept
        told = real(self, call, clients)
        if call.round == 1:
            raise KeyboardInterrupt
        return told

    with monkeypatch.context() as patch:
        patch.setattr(ExampleLevel, "orders", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    before = prepare(resumed(config)).data.train
    source.write_text("\n".join([*rows[:5], "nothing like it," + rows[5].rsplit(",", 1)[1], *rows[6:]]))
    (changed,) = (c for c, d in prepare(resumed(config)).data.train.items() if list(d) != list(before[c]))
    books = ledger(run(resumed(config))).entries
    assert {c: sum(e.round == 2 for e in es) for c, es in books.items()} == {
        c: 2 if c == changed else 1 for c in CLIENTS
    }
    assert all(sum(e.round == 3 for e in es) == 1 for es in books.values())


def test_a_kill_while_counts_are_asked_for_charges_each_count_once(make_config, monkeypatch, tmp_path, tiny):
    monkeypatch.delenv(TEST_KEY)
    source = tmp_path / "d.csv"
    rows = (tiny / "classes.csv").read_text().splitlines()
    source.write_text("\n".join(rows))
    config = make_config(
        task="classification",
        data={"source": str(source), "max_length": 48},
        method__name="ffa",
        privacy={"noise": 1.0},
    )
    real, counts = NoisedCount.answer, []

    def dies(self, side, client, kept):
        told = real(self, side, client, kept)
        counts.append((client, told["count"].item()))
        if len(counts) == 2:
            raise KeyboardInterrupt
        return told

    monkeypatch.setattr(NoisedCount, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    again = run(resumed(config))
    assert dict(counts[2:])["client-0"] == counts[0][1] and dict(counts[2:])["client-1"] == counts[1][1]
    assert all(sum(e.release.what == "count" for e in es) == 1 for es in ledger(again).entries.values())

    config = make_config(
        task="classification",
        data={"source": str(source), "max_length": 48},
        method__name="ffa",
        privacy={"noise": 1.0},
    )
    counts.clear()
    with pytest.raises(KeyboardInterrupt):
        run(config)
    source.write_text("\n".join(rows[:-1]))  # another split, so other data for all
    books = ledger(run(resumed(config))).entries
    assert all(sum(e.release.what == "count" for e in es) == 2 for es in books.values())


def test_private_sketches_have_sensitivity_one(make_config):
    """Take any one example out: the noiseless sum moves by at most 1, over all layers together."""
    from fedray.privacy.keys import Key
    from fedray.privacy.private import SketchNoise
    from fedray.training import subspace

    trainer = LocalTrainer(make_config(task="classification", adapter__rank=3, privacy={"noise": 1.0}), "cpu", 1)
    trainer._load(*_view(trainer))
    examples = trainer.examples("train", "client-0")[:6]
    sides = subspace.gaussian_tests(trainer.layers, 0, 0)

    def total(given, sketch=subspace.range_sketch, sides=sides):
        told = sketch(trainer, given, sides, SketchNoise(0.0, Key(b"k" * 32).stream("x"), 1.0))
        return torch.cat([t.double().flatten() for t in told.values()])

    bases = {n: torch.linalg.qr(torch.randn(next(x for x in trainer.layers if x.name == n).m, 3)).Q for n in sides}
    for sketch, given in ((subspace.range_sketch, sides), (subspace.row_sketch, bases)):
        everything = total(examples, sketch, given)
        moves = [(everything - total(examples[:i] + examples[i + 1 :], sketch, given)).norm().item() for i in range(6)]
        assert all(0.99 < m <= 1 + 1e-6 for m in moves)


def _view(trainer):
    from fedray.config.build import make_method, make_spec

    config = trainer.config
    method, spec = make_method(config), make_spec(config, trainer.layers, trainer.data.clients)
    state = method.init(spec, trainer.describe()[1], trainer.start_from_weights(spec.adapter))
    return method.view(spec, state, None), config.federation, None, None
