"""Client-level privacy that trusts nobody: noise in whole numbers inside the sum, short noise, and who is believed."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from private_runs import killed_after, known, ledger, resumed
from support import final_tensors, rounds, run, same_bits

from fedray.errors import ConfigError, PrivacyError, RoundError
from fedray.federation.channels.base import Admission
from fedray.federation.channels.distributed import Distributed, DistributedSide, against_liars
from fedray.federation.channels.secure import SecureSums
from fedray.federation.worker import Worker
from fedray.privacy import client_level, discrete, secure_sum
from fedray.privacy.accountant import epsilon
from fedray.privacy.keys import TEST_KEY
from fedray.privacy.ledger import EVERYONE
from fedray.training.local import LocalTrainer

NOBODY = {"unit": "client", "trust": "nobody", "secure_aggregation": True}


def nobody(make_config, method="ffa", **privacy):
    privacy = privacy or {"epsilon": 8.0, "delta": 0.01}
    return make_config(method__name=method, privacy=NOBODY | privacy, federation__quorum=0.6)


def test_the_noise_of_a_round_is_that_of_the_plan_and_nobody_sees_the_sum_without_it(make_config, monkeypatch):
    """What the coordinator opens, less what clients meant to send: normal, with the deviation that was charged."""
    meant, opened, real_total, real_changed = [], [], SecureSums.total, DistributedSide.changed

    def total(self, agreed, packets):
        opened.append(real_total(self, agreed, packets))
        return opened[-1]

    def changed(self, *args):
        meant.append(real_changed(self, *args))
        return meant[-1]

    monkeypatch.setattr(SecureSums, "total", total)
    monkeypatch.setattr(DistributedSide, "changed", changed)
    folder = run(nobody(make_config, noise=1.5, clip=0.5))
    errors = []
    for round, sums in enumerate(opened):
        updates = meant[3 * round : 3 * round + 3]
        assert all(0 < client_level.norm(update) <= 0.5 for update in updates)
        errors += [(t - sum(u[n].double() for u in updates)).flatten() for n, t in sums.items()]
    error = torch.cat(errors) / (1.5 * 0.5)
    assert len(opened) == 3 and len(error) > 1000
    assert (
        abs(error.std().item() - 1) < 4 / math.sqrt(2 * len(error)) and abs(error.mean().item()) < 4 / len(error) ** 0.5
    )
    book = ledger(folder)
    assert [(e.release.noise, e.release.discrete, e.round) for e in book.entries[EVERYONE]] == [
        (1.5, True, r) for r in (1, 2, 3)
    ]
    assert not list((folder / "checkpoint").glob("*coordinator*"))


@pytest.mark.parametrize("method", ["ffa", "fedit", "ravan"])
def test_it_keeps_its_budget_and_ends_in_the_same_bits_after_a_kill(make_config, monkeypatch, method):
    adapter = {"adapter": {"kind": "ravan", "rank": 2}} if method == "ravan" else {}
    privacy = NOBODY | {"epsilon": 8.0, "delta": 0.01}
    configs = [make_config(method__name=method, privacy=privacy, **adapter) for _ in range(2)]
    whole = run(configs[0])
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(configs[1])
    again = run(resumed(configs[1]))
    for one, other in zip(rounds(whole), rounds(again), strict=True):
        assert known([one])[0].keys() == known([other])[0].keys() and one["epsilon"] == other["epsilon"]
    spent = rounds(whole)[-1]["epsilon"]["client-0"]
    assert 7.5 < spent <= 8.0
    statement = json.loads((whole / "privacy.json").read_text())["guarantee"]
    assert statement["epsilon_by_client"]["client-0"] == spent and "the coordinator included" in statement["trust"]
    assert statement["epsilon_against_a_lying_coordinator"] > spent


def test_a_client_that_is_missing_leaves_less_noise_which_is_charged_before_the_sum_is_opened(make_config, monkeypatch):
    real, charged, real_total = LocalTrainer.train, [], SecureSums.total

    def fails(self, view, client, round, *args):
        if client == "client-1" and round == 1:
            raise OSError("gone")
        return real(self, view, client, round, *args)

    def total(self, agreed, packets):
        charged.append(json.loads((self.context.folder / "ledger.json").read_text())["entries"][EVERYONE])
        return real_total(self, agreed, packets)

    monkeypatch.setattr(LocalTrainer, "train", fails)
    monkeypatch.setattr(SecureSums, "total", total)
    folder = run(nobody(make_config, noise=2.0, delta=0.01))
    entries = ledger(folder).entries[EVERYONE]
    assert [(e.round, e.release.what) for e in entries] == [
        (1, "training"),
        (2, "training"),
        (2, "training, noise short"),
        (3, "training"),
    ]
    assert len(charged[1]) == 3  # on disk when the sum is opened
    both = [e.release for e in entries if e.round == 2]
    two_of_three = dataclasses.replace(both[0], noise=discrete.effective_noise(2.0, 3, 2))
    assert math.isclose(epsilon(both, 0.01), epsilon([two_of_three], 0.01), rel_tol=1e-6)
    assert rounds(folder)[-1]["epsilon"]["client-0"] > epsilon([dataclasses.replace(both[0], steps=3)], 0.01)


def test_noise_that_is_too_short_for_the_budget_keeps_the_sum_closed(make_config, monkeypatch):
    real = LocalTrainer.train

    def fails(self, view, client, round, *args):
        if client == "client-1" and round == 2:
            raise OSError("gone")
        return real(self, view, client, round, *args)

    monkeypatch.setattr(LocalTrainer, "train", fails)
    with pytest.raises(PrivacyError, match="2 of 3 clients sent, so the noise of their sum is short.*stays closed"):
        run(nobody(make_config))


def test_clients_take_noise_and_clip_from_their_own_config(make_config, monkeypatch):
    for change in ({"noise": 0.1}, {"noise": 1e9}, {"clip": 100.0}):

        def generous(self, call, clients, real=Distributed.orders, change=change):
            orders, refused = real(self, call, clients)
            return {c: dataclasses.replace(o, **change) for c, o in orders.items()}, refused

        with monkeypatch.context() as patch:
            patch.setattr(Distributed, "orders", generous)
            with pytest.raises(RoundError, match="another clip or noise than the client's own config gives"):
                run(nobody(make_config))


def test_a_client_answers_a_round_once(make_config, monkeypatch):
    """A second sum of the same round with other noise would halve it."""
    real, refused = Worker.train, []

    def attacked(self, client, round, header, packet, fetch, kept, orders):
        done = real(self, client, round, header, packet, fetch, kept, orders)
        if client == "client-0" and round == 1:
            zero = type(packet)(packet.manifest, np.zeros_like(packet.vector))
            for changed in (
                {"packet": zero},
                {"orders": dataclasses.replace(orders, expected=1.0)},
                {"round": 7},
                {"orders": dataclasses.replace(orders, run="other", key="")},
            ):
                call = {"round": round, "header": header, "packet": packet, "orders": orders} | changed
                update, _, report = real(self, client, fetch=fetch, kept=kept, **call)
                assert update is None and "it sends nothing" in report.cause, report
                refused.append(changed)
        return done

    monkeypatch.setattr(Worker, "train", attacked)
    run(nobody(make_config))
    assert len(refused) == 4


def test_a_sum_of_fewer_clients_than_all_is_refused(make_config, monkeypatch):
    """Its noise would be that of the few, whatever is charged."""
    few = lambda self, round, message: self.with_agreement(Admission(list(self.context.clients)[:3]))  # noqa: E731
    monkeypatch.setattr(Distributed, "admit", few)
    privacy = NOBODY | {"noise": 2.0, "delta": 0.01}
    with pytest.raises(RoundError, match="a secure sum of other clients than all of the run"):
        run(make_config(method__name="ffa", privacy=privacy, federation__clients=6))


def test_two_runs_have_other_noise_and_one_client_other_noise_than_the_next(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    drawn, real = [], discrete.integers

    def integers(stream, deviation, count):
        drawn.append(real(stream, deviation, count))
        return drawn[-1]

    monkeypatch.setattr(discrete, "integers", integers)
    one, other = run(nobody(make_config)), run(nobody(make_config))
    assert len(drawn) == 18 and all((a != b).any() for i, a in enumerate(drawn) for b in drawn[:i])
    a, b = final_tensors(one), final_tensors(other)
    assert any(not torch.equal(a[n], b[n]) for n in a)
    with pytest.raises(AssertionError):
        same_bits(one, other)


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"unit": "client", "trust": "nobody", "noise": 1.0}, "switch privacy.secure_aggregation on"),
        ({"trust": "nobody", "noise": 1.0, "secure_aggregation": True}, "is of privacy.unit client"),
        (NOBODY | {"noise": 1.0, "adaptive_clip": 0.5}, "privacy.adaptive_clip lets the coordinator say"),
        ({"trust": "nobody"}, "privacy.trust without privacy.epsilon would protect nothing"),
    ],
)
def test_what_needs_somebody_who_is_trusted_is_refused(make_config, privacy, words):
    with pytest.raises(ConfigError, match=words):
        make_config(method__name="ffa", privacy=privacy)


def test_a_clip_of_few_steps_is_refused_by_the_client(make_config):
    with pytest.raises(RoundError, match="too little for whole numbers, which need 10: raise privacy.clip: it sends"):
        run(nobody(make_config, noise=0.5, clip=30 * secure_sum.STEP))


def test_a_lying_coordinator_gets_at_most_what_is_stated(make_config):
    folder = run(nobody(make_config, noise=2.0, delta=0.01))
    plan = ledger(folder).plans[EVERYONE]
    assert math.isclose(against_liars(plan, 3, 3), plan.epsilon)
    assert against_liars(plan, 2, 3) > plan.epsilon
    assert Path(folder / "privacy.json").is_file()


@pytest.mark.parametrize("where", ["in its steps", "in what they give"])
def test_a_client_whose_training_is_not_finite_sends_noise_as_the_others_do(make_config, monkeypatch, caplog, where):
    """The coordinator chooses what is trained from: who fails at which of its broadcasts would tell of data."""
    real = LocalTrainer.train

    def train(self, view, client, *args):
        if client != "client-1":
            return real(self, view, client, *args)
        if where == "in its steps":
            raise FloatingPointError(f"the loss of {client} became nan at local step 2")
        result = real(self, view, client, *args)
        bad = {name: torch.full_like(t, float("inf")) for name, t in result.tensors.items()}
        return dataclasses.replace(result, tensors=bad)

    monkeypatch.setattr(LocalTrainer, "train", train)
    folder = run(nobody(make_config, noise=1.5, clip=0.5))
    assert all(not record["dropped"] for record in rounds(folder)[1:])
    assert all(torch.isfinite(t).all() for t in final_tensors(folder).values())
    assert "client client-1 sends an update of zero, with its noise" in caplog.text
    assert "became nan" not in (folder / "rounds.jsonl").read_text()


def test_an_errors_own_words_stay_with_a_client_that_trusts_nobody(make_config):
    worker = Worker(nobody(make_config), "cpu", 1)
    said = worker.side.failure("client-0", FloatingPointError("patient Smith is not finite"))
    assert "Smith" not in said.cause and said.cause.startswith("FloatingPointError; its words are in the log")
