"""Secure sums in whole runs: equal to the plain ones, never an update in clear, never opened twice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from private_runs import resumed
from scipy import stats
from support import final_tensors, options, rounds, run

from fedray.cli import main
from fedray.errors import ConfigError, PrivacyError, RoundError
from fedray.federation import pool_inline
from fedray.federation.channels import plain, secure
from fedray.federation.channels.masked import Advertise, Masked, Reveal
from fedray.federation.channels.secure import SecureSums
from fedray.federation.coordinator import Coordinator
from fedray.federation.messages import Failure, SumStep
from fedray.federation.prepare import prepare
from fedray.federation.questions import DenseGradient, RangeSketch
from fedray.federation.run import execute
from fedray.federation.wire import Packet
from fedray.plan import plan
from fedray.privacy import secure_sum
from fedray.privacy.keys import Key
from fedray.training import subspace
from fedray.training.local import LocalTrainer


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+ffa", "lora+rolora", "lora-sb+fed-sb", "ravan+ravan"])
def test_a_secure_run_equals_the_plain_one_within_the_fixed_point_step(make_config, pair, monkeypatch):
    given = options(pair) | (
        {"adapter": {"kind": "lora-sb", "rank": 2, "subspace": "gradient-raw"}} if pair == "lora-sb+fed-sb" else {}
    )
    clear, config = run(make_config(**given)), make_config(**given, privacy={"secure_aggregation": True})
    received, fetch = [], pool_inline.InlinePool.fetch
    monkeypatch.setattr(
        pool_inline.InlinePool, "fetch", lambda self, sent: received.append(fetch(self, sent)) or received[-1]
    )
    prepared = prepare(config)
    execute(prepared)
    folder = Path(config.output.dir)
    a, b = final_tensors(clear), final_tensors(folder)
    assert all((a[n] - b[n]).abs().max() <= 1e-5 * a[n].abs().max().clamp_min(1e-3) for n in a)
    # Whether the two runs differ in a bit depends on the processor. That what arrived was masked holds on all: numbers
    # below 10 look as if drawn from the whole ring.
    assert len(received) >= 9 and all(packet.vector.dtype == "uint64" for packet in received)
    assert max(t.abs().max() for t in a.values()) < 10.0
    assert all(np.median(np.abs(secure_sum.decode(packet.vector))) > 2.0**28 for packet in received)
    for record in rounds(folder):
        assert record["aggregation_error"] is None
        assert record["exactness"] is None if pair == "lora+fedit" else 0 < record["exactness"] < 1e-6
    cost, summary = plan(config, prepared.cohort).costs[0], json.loads((folder / "summary.json").read_text())
    assert (summary["bytes_up"], summary["bytes_down"]) == (3 * cost.run_up, 3 * cost.run_down)


def test_the_coordinator_of_a_secure_run_never_holds_an_update(make_config, monkeypatch):
    seen, clear = [], []
    real_fetch, real_seal = pool_inline.InlinePool.fetch, Masked.seal

    def sealed(self, client, tensors, orders, asked):
        clear.append(torch.cat([t.double().reshape(-1) for _, t in sorted(tensors.items())]))
        return real_seal(self, client, tensors, orders, asked)

    def fetched(self, update):
        """Each is looked at when it is judged, and when it is added."""
        packet = real_fetch(self, update)
        if not any(packet is other for other in seen):
            seen.append(packet)
        return packet

    monkeypatch.setattr(pool_inline.InlinePool, "fetch", fetched)
    monkeypatch.setattr(Masked, "seal", sealed)
    folder = run(make_config(method__name="ffa", privacy={"secure_aggregation": True}, federation__rounds=2))
    assert len(seen) == len(clear) == 6
    everything = np.concatenate([np.frombuffer(packet.vector.tobytes(), dtype=np.uint8) for packet in seen])
    assert len(everything) > 10_000 and stats.chisquare(np.bincount(everything, minlength=256)).pvalue > 1e-6
    assert not list((folder / "checkpoint").glob("*/kept*")) and all(
        not json.loads(p.read_text())["kept"] for p in folder.glob("checkpoint/round-*/state.json")
    )
    for packet, values in zip(seen, clear, strict=True):
        assert packet.vector.dtype == "uint64"
        read = torch.from_numpy(secure_sum.decode(packet.vector))
        assert (read - values).abs().min() > 1.0 and abs(torch.corrcoef(torch.stack([read, values]))[0, 1]) < 0.2


def test_clients_that_fail_leave_the_sum_right_and_below_the_threshold_the_run_fails(make_config, monkeypatch):
    real = LocalTrainer.train

    def fails(who):
        def train(self, view, client, round, *args):
            if client in who and round == 1:
                raise OSError("its disk is gone: row 17 'Mrs Smith'")
            return real(self, view, client, round, *args)

        return train

    given = dict(method__name="ffa", federation__clients=5, federation__quorum=0.3)
    monkeypatch.setattr(LocalTrainer, "train", fails(["client-1", "client-4"]))
    clear, summed = run(make_config(**given)), run(make_config(**given, privacy={"secure_aggregation": True}))
    a, b = final_tensors(clear), final_tensors(summed)
    assert all((a[n] - b[n]).abs().max() < 1e-7 for n in a)
    assert [[d["client"] for d in r["dropped"]] for r in rounds(summed)] == [[], ["client-1", "client-4"], []]
    monkeypatch.setattr(LocalTrainer, "train", fails(["client-0", "client-1", "client-4"]))
    with pytest.raises(PrivacyError, match="stays closed .*2 clients sent their part"):
        run(make_config(**given, privacy={"secure_aggregation": True}))
    # Nor do an error's words leave a private client.
    with pytest.raises(RoundError) as caught:
        run(make_config(**given | {"federation__quorum": 0.9}, privacy={"epsilon": 3.0}))
    assert "OSError" in str(caught.value) and "Smith" not in str(caught.value) + caught.value.details


def test_a_secure_sum_is_not_opened_again_of_others_parts(make_config, monkeypatch):
    """Clients send the same again after a kill: two sums that differ by one client would show its update."""
    config = make_config(
        method__name="ffa", privacy={"secure_aggregation": True}, federation__quorum=0.5, federation__clients=4
    )
    real, calls = Coordinator.publish, []

    def dies(self, state):  # opened and aggregated, not saved
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    with monkeypatch.context() as patch:
        train = LocalTrainer.train

        def fails(self, view, client, *args):
            if client == "client-2":
                raise RuntimeError("gone")
            return train(self, view, client, *args)

        patch.setattr(LocalTrainer, "train", fails)
        with pytest.raises(
            PrivacyError,
            match="round 2 was opened of client-0, client-1, client-2, client-3 before, and of client-0, client-1, "
            "client-3 it would show",
        ):
            run(resumed(config))
    assert len(rounds(run(resumed(config)))) == 3


# --- a coordinator that lies -------------------------------------------------------------------------------------


def summed_run(make_config, quorum=1.0, **privacy):
    return make_config(
        method__name="ffa",
        federation__clients=4,
        federation__quorum=quorum,
        federation__rounds=2,
        privacy={"secure_aggregation": True} | privacy,
    )


def test_a_client_sends_nothing_in_clear_that_its_own_config_hides(make_config, monkeypatch):
    """Orders that name no sum: the client once sent its update as it was."""
    asked = []

    def in_clear(self, agreed, orders, weight):
        told = self.context.pool.ask(DenseGradient(("x",), 4), self.context.clients, {}, None)
        told += self.context.pool.ask(RangeSketch(None, 4, columns=2), self.context.clients, {}, None)
        asked.extend(o.report for o in told)
        return dict(orders)

    monkeypatch.setattr(plain.PlainSide, "plain_examples", lambda *args: [])
    monkeypatch.setattr(subspace, "dense", lambda *args: {"x": torch.ones(2)})
    monkeypatch.setattr(subspace, "range_sketch", lambda *args: {"x": torch.ones(2)})
    monkeypatch.setattr(SecureSums, "seal", in_clear)
    for privacy in ({}, {"epsilon": 8.0}, {"epsilon": 8.0, "unit": "client"}):
        # Each is asked in two attempts, for two things beside its update.
        with pytest.raises(RoundError, match="asked for its update in clear, and the client's own config has"):
            run(summed_run(make_config, **privacy))
    assert len(asked) == 3 * 2 * 8 and all(isinstance(report, Failure) for report in asked)
    assert "asked for the gradient of a few layers in clear" in asked[0].cause and "a sketch of" in asked[4].cause


def test_what_each_client_sends_in_clear_is_refused_beside_secure_sums(make_config):
    sb = {"method__name": "fed-sb", "privacy": {"secure_aggregation": True}}
    with pytest.raises(ConfigError, match="subspace gradient has each client send its gradient in clear"):
        make_config(adapter={"kind": "lora-sb", "rank": 2, "subspace": "gradient"}, **sb)
    for share, identities, words in ((0.5, None, "a half"), (0.6, "f", "two thirds"), (0.3, None, "a half")):
        with pytest.raises(ConfigError, match=f"secure_threshold {share} is not above {words}"):
            summed_run(make_config, secure_threshold=share, identities=identities)
    assert summed_run(make_config, secure_threshold=0.51).privacy.secure_threshold == 0.51
    for key in ("identities", "secure_colluding"):
        with pytest.raises(ConfigError, match=f"privacy.{key} belongs to privacy.secure_aggregation"):
            make_config(privacy={key: "0.1"})


@pytest.mark.parametrize(
    "privacy", [{}, {"epsilon": 8.0}, {"epsilon": 8.0, "unit": "client"}], ids=["examples", "noised counts", "equal"]
)
def test_a_client_weighs_its_update_by_its_own_count_alone(make_config, monkeypatch, privacy):
    """A coordinator that weighs all but one with nothing reads that one out of the sum."""
    real = SecureSums.seal

    def lies(self, agreed, orders, weight):
        told = real(self, agreed, orders, weight)
        return {c: o if c == "client-0" else replace(o, weight=1e-9) for c, o in told.items()}

    monkeypatch.setattr(SecureSums, "seal", lies)
    with pytest.raises(RoundError, match="ordered another weight in a secure sum") as caught:
        run(summed_run(make_config, **privacy))
    assert caught.value.args[0].count("another weight") == 3


@pytest.mark.parametrize("privacy", [{}, {"epsilon": 8.0, "unit": "client"}], ids=["no DP", "clients"])
def test_clients_that_were_given_other_models_open_no_sum(make_config, monkeypatch, privacy):
    """A model with which the others send nothing leaves one client in the sum (Pasquini et al., CCS 2022)."""
    real = pool_inline.InlinePool.train

    def lies(self, handle, round, clients, *args):
        rest = [c for c in clients if c != "client-2"]
        dead = replace(handle, packet=Packet(handle.packet.manifest, np.zeros_like(handle.packet.vector)))
        return real(self, dead, round, rest, *args) + real(self, handle, round, ["client-2"], *args)

    monkeypatch.setattr(pool_inline.InlinePool, "train", lies)
    with pytest.raises(PrivacyError, match="stays closed .*'client-2' did not sign the list of who sent"):
        run(summed_run(make_config, **privacy))


def test_clients_refuse_a_second_opening_whatever_the_coordinator_remembers(make_config, monkeypatch):
    """As above, with a coordinator that has lost, or hides, what it opened before the kill."""
    config, real, calls = summed_run(make_config, quorum=0.5), Coordinator.publish, []

    def dies(self, state):  # opened and aggregated, not saved
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "publish", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    monkeypatch.setattr(SecureSums, "_remember", lambda *args: None)
    with monkeypatch.context() as patch:
        train = LocalTrainer.train

        def fails(self, view, client, *args):
            if client == "client-2":
                raise RuntimeError("gone")
            return train(self, view, client, *args)

        patch.setattr(LocalTrainer, "train", fails)
        with pytest.raises(PrivacyError, match="stays closed .*round 2 was opened of other clients before"):
            run(resumed(config))
    assert len(rounds(run(resumed(config)))) == 2


def test_with_identities_a_run_has_the_same_bits_and_an_impostor_opens_nothing(
    make_config, monkeypatch, tmp_path, capsys
):
    clients, folder = [f"client-{i}" for i in range(4)], tmp_path / "keys"
    for client in clients:
        assert main(["identity", "--client", client, "--key_dir", str(folder)]) == 0
    (tmp_path / "identities.yaml").write_text(first := capsys.readouterr().out)
    assert main(["identity", "--client", clients[0], "--key_dir", str(folder)]) == 0
    assert capsys.readouterr().out == first.splitlines(keepends=True)[0]  # its own key stays
    privacy = {"identities": str(tmp_path / "identities.yaml"), "key_dir": str(folder)}
    with_them = run(summed_run(make_config, **privacy))
    plain_run = run(summed_run(make_config))
    a, b = final_tensors(with_them), final_tensors(plain_run)
    assert all(torch.equal(a[n], b[n]) for n in a)
    # Who has an identity takes part in no sum without.
    with pytest.raises(RoundError, match="has an identity, and this run names no privacy.identities"):
        run(summed_run(make_config, key_dir=str(folder)))
    # The coordinator answers for a client itself.
    real = SecureSums._values

    def impostor(self, question):
        values, failed = real(self, question)
        if isinstance(question, Advertise):
            forged = secure_sum.Party(
                "client-1",
                Key(bytes(32)),
                secure_sum.Rule(),
                secure_sum.Identities(tmp_path / "c", None),
                tmp_path,
                self.run,
            )
            session = next(iter(question.steps.values())).session
            values["client-1"] = forged.advertise(session)
        return values, failed

    monkeypatch.setattr(SecureSums, "_values", impostor)
    with pytest.raises(RoundError, match="keys of client 'client-1' for a secure sum are not signed by it"):
        run(summed_run(make_config, **privacy))
    assert main(["identity"]) == 2 and "takes --client NAME" in capsys.readouterr().err


def test_privacy_json_says_whether_a_coordinator_could_impersonate(make_config):
    limits = {
        signed: " ".join(
            line.what for line in secure.limits(summed_run(make_config, identities="f" if signed else None))
        )
        for signed in (True, False)
    }
    assert "A coordinator that impersonates clients" in limits[False]
    assert "impersonates" not in limits[True] and "private keys of the clients' identities" in limits[True]


def test_a_client_gets_of_a_question_what_is_for_it_alone():
    steps = {c: SumStep("run", "name", sealed={"other": c.encode()}) for c in "abc"}
    assert Reveal(steps).of("b").steps == {"b": steps["b"]} and not Reveal(steps).common
