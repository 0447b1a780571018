"""A coordinator that does not follow the protocol, against clients with example-level privacy: after the honest answer
it asks again in every way that might meet the same noise, and gets nothing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run

from fedray.audit.attack import as_integers, forged, renamed, structured
from fedray.config.sections import Config
from fedray.errors import PrivacyError
from fedray.federation.channels.example import ExampleLevel, NoisedCount
from fedray.federation.messages import Answered, Orders, Trained
from fedray.federation.questions import RangeSketch, RowSketch, forget_keys
from fedray.federation.wire import Packet, pack
from fedray.federation.worker import Worker
from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.journal import KEYS_A_RUN, Journal, Said
from fedray.privacy.keys import TEST_KEY, Stream

CLIENT = "client-0"


def zeros(packet: Packet) -> Packet:
    return Packet(packet.manifest, np.zeros_like(packet.vector))


def refused(update, report) -> bool:
    """One sentence, and nothing else."""
    assert update is None
    assert report.cause.endswith("it sends nothing") or "it sends nothing; " in report.cause, report
    assert "\n" not in report.cause and not report.details
    return True


#: What a coordinator may change of a round's call: arguments by name -> other arguments.
ROUNDS = {
    "zero packet": lambda a: {"packet": zeros(a["packet"])},
    "zero packet, forged digest": lambda a: {"packet": forged(zeros(a["packet"]), a["packet"])},
    "names exchanged, forged digest": lambda a: {"packet": forged(renamed(a["packet"]), a["packet"])},
    "another type, forged digest": lambda a: {"packet": forged(as_integers(a["packet"]), a["packet"])},
    "a structure for each number": lambda a: {"packet": structured(a["packet"])},
    "other draw": lambda a: {"header": dataclasses.replace(a["header"], draw={"A": 7, "B": 7, "R": 7})},
    "other plain": lambda a: {"header": dataclasses.replace(a["header"], plain={"blocks": []} | {"x": 1})},
    "fewer train": lambda a: {"header": dataclasses.replace(a["header"], trained=a["header"].trained[:-1])},
    "header of another round": lambda a: {"header": dataclasses.replace(a["header"], round=a["header"].round + 1)},
    "a round that is none": lambda a: {"round": 99},
    "a round before the first": lambda a: {"round": -1},
    "a round that is no whole number": lambda a: {"round": float(a["round"])},
    "a round that is a truth": lambda a: {"round": True},
    "more noise": lambda a: {"orders": dataclasses.replace(a["orders"], noise=a["orders"].noise * 2)},
    "another divisor": lambda a: {"orders": dataclasses.replace(a["orders"], expected=1e-3)},
    "another weight": lambda a: {"orders": dataclasses.replace(a["orders"], weight=5.0)},
    "another run": lambda a: {"orders": dataclasses.replace(a["orders"], run="another", key="")},
    "no number as the rate": lambda a: {"orders": dataclasses.replace(a["orders"], rate=float("nan"))},
}
INCREMENTS = {
    "zero increments": lambda a: {"fetch": lambda v: zeros(a["fetch"](v))},
    "zero increments, forged digest": lambda a: {"fetch": lambda v: forged(zeros(a["fetch"](v)), a["fetch"](v))},
    "structured increments": lambda a: {"fetch": lambda v: structured(a["fetch"](v))},
    "no increments": lambda a: {"header": dataclasses.replace(a["header"], increments=())},
    "increments twice": lambda a: {"header": dataclasses.replace(a["header"], increments=a["header"].increments * 2)},
}
KEPT = {
    "kept nothing": lambda a: {"kept": None},
    "kept zeros": lambda a: {"kept": zeros(a["kept"])},
    "kept structures": lambda a: {"kept": structured(a["kept"])},
    "kept zeros, forged digest": lambda a: {"kept": forged(zeros(a["kept"]), a["kept"])},
}
PRIVATE = {"epsilon": 3.0, "count_noise": 2.0}
RUNS = {
    "fedit": ({"method__name": "fedit", "privacy": {"noise": 1.0}}, ROUNDS),
    "fedex": ({"method__name": "fedex", "privacy": PRIVATE, "federation__optimizer": "sgd"}, ROUNDS),
    "flora": ({"method__name": "flora", "privacy": PRIVATE}, INCREMENTS),
    "fed-sb": (
        {"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 2}, "privacy": PRIVATE},
        ROUNDS | INCREMENTS,
    ),
    "fedsa": ({"method__name": "fedsa", "privacy": PRIVATE}, ROUNDS | KEPT),
    "fedit, kept optimizer": (
        {"method__name": "fedit", "privacy": PRIVATE, "federation__keep_optimizer": True},
        ROUNDS | KEPT,
    ),
}


def test_of_two_packets_of_one_digest_a_client_takes_neither():
    packet = pack({"a": torch.arange(4.0) + 1})
    one, other = structured(packet, 0), structured(packet, 4)
    assert one.digest == other.digest and one.vector["x"].any() and not other.vector["x"].any()
    for odd in (one, other, as_integers(packet), Packet(packet.manifest, np.ma.masked_array(packet.vector))):
        with pytest.raises(PrivacyError, match="no plain vector of fp32 numbers"):
            odd.again()
    assert packet.again().digest == packet.digest


@pytest.mark.parametrize("name", RUNS)
def test_a_client_gives_no_second_release_of_a_round(make_config, monkeypatch, name):
    overrides, attacks = RUNS[name]
    real, tried = Worker.train, []

    def attacked(self, client, round, header, packet, fetch, kept, orders):
        names = ("round", "header", "packet", "fetch", "kept", "orders")
        honest = dict(zip(names, (round, header, packet, fetch, kept, orders), strict=True))
        done = real(self, client, **honest)
        assert isinstance(done[2], Trained), done[2]
        if client == CLIENT and round == 1:
            for attack, change in attacks.items():
                self._increments.clear()  # whatever it still holds is asked for again
                update, _, report = real(self, client, **honest | change(honest))
                assert refused(update, report), attack
                tried.append(attack)
            again = real(self, client, **honest)[0]
            assert (again.vector == done[0].vector).all()  # the same question from the same inputs tells nothing new
        return done

    monkeypatch.setattr(Worker, "train", attacked)
    run(make_config(**overrides))
    assert len(tried) == len(attacks)


def shorter(sides: Packet) -> Packet:
    """Sides of layers that the model has not got."""
    manifest = tuple((name, (m - 1, q)) for name, (m, q) in sides.manifest)
    return Packet(manifest, np.zeros(sum((m - 1) * q for _, (m, q) in sides.manifest), np.float32))


def test_sides_that_fit_no_layer_are_refused_whoever_was_sampled(make_config, monkeypatch):
    """They would fail only where an example is multiplied with them, and so tell of an empty sample."""
    real, refusals = Worker.ask, []

    def ask(self, client, question, kept):
        if client == CLIENT and isinstance(question, RowSketch):
            odd = dataclasses.replace(question, sides=shorter(question.sides))
            monkeypatch.setattr(Stream, "sample", lambda self, count, rate: [])
            refusals.append(real(self, client, odd, kept)[2].cause)
            monkeypatch.setattr(Stream, "sample", lambda self, count, rate: list(range(count)))
            refusals.append(real(self, client, odd, kept)[2].cause)
        return real(self, client, question, kept)

    monkeypatch.setattr(Worker, "ask", ask)
    adapter = {"kind": "lora-sb", "rank": 2, "subspace": "private"}
    run(make_config(method__name="fed-sb", adapter=adapter, privacy={"epsilon": 8.0}, federation__rounds=1))
    assert len(refusals) == 2 and len(set(refusals)) == 1 and "sides of a sketch that are none" in refusals[0]


def test_a_client_gives_no_second_release_of_a_sketch(make_config, monkeypatch):
    real, tried = Worker.ask, []

    def attacks(question):
        yield dataclasses.replace(question, examples=question.examples + 1)
        yield dataclasses.replace(question, columns=question.columns + 1)
        orders = {c: dataclasses.replace(o, expected=1e-3) for c, o in question.orders.items()}
        yield dataclasses.replace(question, orders=orders)
        if question.sides is not None:
            for change in (zeros, renamed, as_integers):
                sides = change(question.sides)
                yield dataclasses.replace(question, sides=sides)
                yield dataclasses.replace(question, sides=forged(Packet(*dataclasses.astuple(sides)), question.sides))
            yield dataclasses.replace(question, sides=structured(question.sides))
            yield dataclasses.replace(question, sides=shorter(question.sides))

    def attacked(self, client, question, kept):
        done = real(self, client, question, kept)
        if client == CLIENT and isinstance(question, (RangeSketch, RowSketch)):
            assert isinstance(done[2], Answered), done[2]
            for attack in attacks(question):
                update, _, report = real(self, client, attack, kept)
                assert refused(update, report)
                tried.append(question.name)
            assert (real(self, client, question, kept)[0].vector == done[0].vector).all()
        return done

    monkeypatch.setattr(Worker, "ask", attacked)
    asked = []

    def after_training(self, client, round, *call, train=Worker.train):
        """The same sketch, of a model that the coordinator has moved since."""
        done = train(self, client, round, *call)
        if client == CLIENT:
            orders = call[-1]
            sketch = Orders(orders.run, orders.key, 1e-3, 99.0, 1.0, 1.0)
            assert refused(*real(self, client, RangeSketch(None, 4, orders={CLIENT: sketch}), None)[::2])
            asked.append(round)
        return done

    monkeypatch.setattr(Worker, "train", after_training)
    adapter = {"kind": "lora-sb", "rank": 2, "subspace": "private"}
    run(make_config(method__name="fed-sb", adapter=adapter, privacy={"epsilon": 8.0}, federation__rounds=1))
    assert tried == ["RANGE"] * 3 + ["ROWS"] * 11 and asked == [0]


def test_what_a_client_refuses_says_nothing_of_its_count_but_what_it_has_told(make_config, monkeypatch):
    """Two clients that differ by an example and have told the same noised number refuse the same orders."""
    answers = []
    for rows, noise in ((61, 0.0), (60, 1.0 / 20.0)):
        monkeypatch.setattr(Stream, "normals", lambda self, count, noise=noise: _constant(count, noise))
        config = make_config(privacy={"epsilon": 3.0}, federation__clients=1)
        worker = Worker(config, "cpu", 1)
        side = worker.side
        monkeypatch.setattr(type(worker.trainer), "examples", lambda self, part, client, rows=rows: _Rows(rows))
        orders = Orders("run")
        assert side.noised_count(CLIENT, orders).item() == 61.0
        told = []
        for denominator in np.linspace(1.0, 120.0, 240):
            asked = dataclasses.replace(orders, rate=4 / denominator, noise=50.0, expected=4.0)
            try:
                side.budget(CLIENT, orders).check_round(0, asked)
                told.append("accepted")
            except PrivacyError as error:
                told.append(str(error))
        answers.append(told)
    assert answers[0] == answers[1] and len(set(answers[0])) >= 2


class _Rows(list):
    def __init__(self, count: int):
        super().__init__(range(count))

    def digest(self) -> bytes:
        return b"the same"


def _constant(count: int, value: float):
    return torch.full((count,), value, dtype=torch.float64)


def test_a_small_silo_does_not_say_that_it_is_small(make_config, monkeypatch):
    worker = Worker(make_config(privacy={"epsilon": 3.0}, clients={CLIENT: {"batch_size": 10_000}}), "cpu", 1)
    monkeypatch.setattr(Config, "siloed", property(lambda config: True))
    assert worker.side.noised_count(CLIENT, Orders("run")).numel() == 1


def test_orders_that_lie_about_the_count_spend_no_more_than_the_budget(make_config, monkeypatch):
    """What was released before training is what the client has answered, not what its orders say of it."""
    overrides = {"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"}}
    config = make_config(**overrides, privacy={"epsilon": 3.0, "count_noise": 2.0, "subspace_fraction": 0.5})
    accepted = []

    def lies(self, call, clients, real=ExampleLevel.orders):
        orders, refused = real(self, call, clients)
        plan = self.ledger.plans[CLIENT]
        for share in (1.0, 0.999, 0.99, 0.97, 0.9):
            changed = dataclasses.replace(orders[CLIENT], noise=plan.noise * share, expected=1e9)
            accepted.append((plan, changed))
        return orders, refused

    def tried(self, client, round, header, packet, fetch, kept, orders, real=Worker.train):
        done = real(self, client, round, header, packet, fetch, kept, orders)
        if client == CLIENT and round == 0:
            budget, checked = self.side.budget(CLIENT, orders), []
            for plan, changed in accepted:
                try:
                    budget.check_round(0, changed)
                except PrivacyError:
                    continue
                steps = self.side.config.federation.rounds * self.side.config.federation.local_steps
                spent = epsilon([*plan.before, Release("training", changed.noise, changed.rate, steps)], plan.delta)
                checked.append(spent)
            assert checked and len(checked) < len(accepted) and max(checked) <= 3.0
        return done

    monkeypatch.setattr(ExampleLevel, "orders", lies)
    monkeypatch.setattr(Worker, "train", tried)
    run(config)


def test_a_journal_outlives_keys_and_half_lines(make_config, tmp_path, monkeypatch):
    def check(releases):
        pass

    journal = Journal.of(tmp_path, "run", CLIENT)
    first = Said("round 1", "key", "inputs", Release("training", 1.0, 0.5, 2))
    journal.answer(first, check)
    journal.answer(first, check)
    with journal.path.open("a") as file:
        file.write('{"what": "round 2", "key"')  # killed while it wrote: the answer was never given
    other = Journal.of(tmp_path, "run", CLIENT)
    other.answer(dataclasses.replace(first, what="round 2"), check)
    assert [one.what for one in journal.said] == [one.what for one in other.said] == ["round 1", "round 2"]
    assert [json.loads(line)["what"] for line in journal.path.read_text().splitlines()] == ["round 1", "round 2"]
    assert Path(journal.path).stat().st_mode & 0o077 == 0
    with pytest.raises(PrivacyError, match="a second time"):
        other.answer(dataclasses.replace(first, inputs="others"), check)
    for key in ("second", "third"):
        other.answer(dataclasses.replace(first, key=key, inputs="others"), check)
    with pytest.raises(PrivacyError, match="start another run"):
        journal.answer(dataclasses.replace(first, key="fourth"), check)


@pytest.mark.parametrize("method", ["fedit", "flora"])
def test_weights_that_a_failed_call_left_half_written_meet_no_noise(make_config, monkeypatch, method):
    """The same round again, after a broadcast that breaks half-way into the base: the model must be the same too."""
    real, repeated = Worker.train, []

    def attacked(self, client, round, header, *call):
        done = real(self, client, round, header, *call)
        if client == CLIENT and round == 1:
            layers = sorted(self.trainer.layers, key=lambda layer: layer.name)
            tensors = {f"{layer.name}.base_B": torch.randn(layer.m, 1) * 3 for layer in layers[:-1]}
            tensors |= {f"{layer.name}.base_A": torch.randn(1, layer.n) for layer in layers}
            tensors[f"{layers[-1].name}.base_B"] = torch.ones(layers[-1].m + 1, 1)
            broken = pack(tensors)
            other = dataclasses.replace(header, increments=(*header.increments, (77, False, broken.digest)))
            packet, fetch = call[0], lambda version: broken if version == 77 else call[1](version)
            with pytest.raises(RuntimeError):
                self.evaluate("test", None, (0, 1), other, packet, fetch)
            for _ in range(2):
                again = real(self, client, round, header, *call)
                repeated.append((again[0].vector == done[0].vector).all())
        return done

    monkeypatch.setattr(Worker, "train", attacked)
    run(make_config(method__name=method, privacy=PRIVATE, federation__optimizer="sgd"))
    assert repeated == [True, True]


@pytest.mark.parametrize("privacy", [{"noise": 1.0}, PRIVATE])
def test_a_run_whose_key_the_coordinator_has_forgotten_is_over(make_config, monkeypatch, privacy):
    monkeypatch.delenv(TEST_KEY)
    real, said = Worker.train, []

    def attacked(self, client, round, header, packet, fetch, kept, orders):
        done = real(self, client, round, header, packet, fetch, kept, orders)
        if client == CLIENT and round == 2:
            before = len(self.side.journal(client, orders).said)
            for _ in range(2):
                self.ask(client, forget_keys(orders.run, [client]), None)
                any_key = dataclasses.replace(orders, key="")
                for report in (
                    self.ask(client, NoisedCount(orders={client: any_key}), None)[2],
                    real(self, client, round, header, packet, fetch, kept, any_key)[2],
                ):
                    assert "this run is over" in report.cause
            said.append(len(self.side.journal(client, orders).said) - before)
        return done

    monkeypatch.setattr(Worker, "train", attacked)
    run(make_config(method__name="fedit", privacy=privacy))
    assert said == [1]


def test_counts_under_other_keys_are_within_the_budget(make_config, monkeypatch, tmp_path):
    """Keys that are lost, not forgotten: each noised count is a release, and all of them are budgeted."""
    monkeypatch.delenv(TEST_KEY)
    privacy = {"epsilon": 0.6, "count_noise": 4.0, "key_dir": str(tmp_path / "keys")}
    worker = Worker(make_config(privacy=privacy), "cpu", 1)
    orders, told = Orders("lost"), []
    for _ in range(KEYS_A_RUN):
        for file in worker.side.keys.folder.rglob("*"):
            if file.is_file() and not file.suffix:
                file.unlink()
        told.append(worker.ask(CLIENT, NoisedCount(orders={CLIENT: orders}), None)[2])
    assert isinstance(told[0], Answered) and "would spend epsilon" in told[-1].cause


def test_an_example_that_is_not_finite_stops_nothing(make_config, monkeypatch):
    """Whether a step stops would tell, without noise, what an example does to a model of the coordinator's choice."""
    real, reports = Worker.train, []

    def attacked(self, client, round, header, packet, *call):
        g = np.random.default_rng(0).standard_normal(packet.vector.shape)
        scales = (1.0, 10.0, 25.0, 26.0, 28.0, 30.0, 1e3)
        monkeypatch.setattr(Journal, "answer", lambda *args: None)  # one model after another: as many runs as models
        wild = [Packet(packet.manifest, (g * scale).astype(np.float32)) for scale in scales]
        reports.extend(real(self, client, round, header, other, *call) for other in wild)
        return real(self, client, round, header, packet, *call)

    monkeypatch.setattr(Worker, "train", attacked)
    run(make_config(method__name="fedit", privacy={"noise": 1.0}, federation__rounds=1))
    assert len(reports) == 21 and {type(report) for _, _, report in reports} == {Trained}
