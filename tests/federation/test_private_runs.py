"""Whole private runs: budgets, ledgers, lost keys, kills and resumes, secure sums, and what is said about it all."""

import dataclasses
import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from support import ROOT, final_tensors, options, rounds, run, sabotaged, same_bits

from fedray.cli import main
from fedray.config.read import from_dict
from fedray.errors import ClientError, ConfigError, PrivacyError, RoundError
from fedray.federation import pool_inline
from fedray.federation import round as rounds_of
from fedray.federation.channels.client import ClippingSide
from fedray.federation.channels.example import Example, NoisedCount
from fedray.federation.channels.plain import Plain
from fedray.federation.channels.secure import Masked
from fedray.federation.coordinator import Coordinator
from fedray.federation.prepare import prepare
from fedray.federation.questions import DenseGradient, RangeSketch, RowSketch
from fedray.federation.run import execute
from fedray.federation.wire import pack
from fedray.plan import plan
from fedray.privacy import client_level, secure_sum
from fedray.privacy.accountant import epsilon
from fedray.privacy.keys import TEST_KEY, KeyStore
from fedray.privacy.ledger import EVERYONE, Ledger
from fedray.privacy.plan import calibrate
from fedray.training.local import LocalTrainer

CLIENTS = ("client-0", "client-1", "client-2")


def ledger(folder: Path) -> Ledger:
    return Ledger.load(folder / "checkpoint" / "ledger.json")


def key_file(client: str) -> str:
    return KeyStore("x")._path("run", client).name


def known(records: list[dict]) -> list[dict]:
    """Records without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def resumed(config):
    return config.model_copy(update={"output": config.output.model_copy(update={"resume": True})})


def killed_after(monkeypatch, calls_left: int):
    """The job dies at a call for training, by a KeyboardInterrupt: nothing gets a chance to clean up."""
    calls = []

    def dies(self, *args, real=pool_inline.InlinePool.train):
        calls.append(1)
        if len(calls) == calls_left:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(pool_inline.InlinePool, "train", dies)


PRIVATE = {
    "fedit": {"method__name": "fedit", "privacy": {"epsilon": 3.0}},
    "fedex, ZeRO 2": {"method__name": "fedex", "privacy": {"epsilon": 3.0}, "worker": {"cpus": 1, "zero_stage": 2}},
    "fed-sb, private subspace": {
        "method__name": "fed-sb",
        "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"},
        "privacy": {"epsilon": 8.0},
        "federation__lr": 0.1,
    },
    "abba, kept": {
        "adapter": {"kind": "abba", "rank": 4, "alpha": 4},
        "privacy": {"noise": 0.8},
        "federation__keep_optimizer": True,
    },
    "fedsa": {"method__name": "fedsa", "privacy": {"epsilon": 3.0}},
    "fedask": {"method__name": "fedask", "privacy": {"epsilon": 3.0}},
    "clients": {"method__name": "ffa", "privacy": {"epsilon": 8.0, "unit": "client", "adaptive_clip": 0.5}},
    "clients, sampled": {
        "method__name": "ravan",
        "adapter": {"kind": "ravan", "rank": 2},
        "privacy": {"noise": 1.0, "unit": "client"},
        "federation__cohort": 2,
    },
    "secure": {"method__name": "rolora", "privacy": {"epsilon": 3.0, "secure_aggregation": True}},
    "secure, clients": {
        "method__name": "fedit",
        "privacy": {"epsilon": 8.0, "unit": "client", "secure_aggregation": True},
    },
}


# A whole run costs seconds: those that share no code with another here, the others marked slow.
OFTEN = ("fedit", "fed-sb, private subspace", "abba, kept", "clients", "secure, clients")


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in PRIVATE])
def test_a_private_run_keeps_its_budget_and_a_resumed_one_ends_in_the_same_bits_and_epsilons(
    make_config, name, monkeypatch
):
    given = {"federation__clients": 3, "federation__rounds": 4, **PRIVATE[name]}
    config = make_config(**given)
    whole = run(config)
    spent = [r["epsilon"] for r in rounds(whole)]
    summary = json.loads((whole / "summary.json").read_text())
    assert len(spent) == 4 and all(list(e) == [f"client-{i}" for i in range(3)] for e in spent)
    assert all(before[c] <= after[c] for before, after in pairwise(spent) for c in before)
    assert summary["epsilon"] == max(spent[-1].values()) and 0 < summary["delta"] < 1
    if config.privacy.epsilon:
        assert 0.98 * config.privacy.epsilon < summary["epsilon"] <= config.privacy.epsilon
    assert all(r["train_loss"] is None and r["metrics"] for r in rounds(whole))

    config = make_config(**given)
    killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    folder = Path(config.output.dir)
    assert len(rounds(folder)) == 2
    assert run(resumed(config)) == folder
    same_bits(whole, folder)  # records too, epsilons among them
    names = [EVERYONE] if config.privacy.unit == "client" else spent[-1]
    for client in names:
        entries = ledger(folder).entries[client]
        training = [e.round for e in entries if e.release.what == "training"]
        assert training == [1, 2, 3, 4] and ledger(folder).epsilon(client) == ledger(whole).epsilon(client)


def test_killed_at_any_moment_of_a_round_the_ledger_says_the_same(make_config, monkeypatch):
    """Before training (charged, not trained), between training and aggregation, and after aggregation without a
    checkpoint."""
    given = dict(method__name="ffa", privacy={"epsilon": 3.0}, federation__rounds=3)
    whole = run(make_config(**given))

    def dying(owner, name, which):
        calls, real = [], getattr(owner, name)

        def dies(*args, **kw):
            calls.append(1)
            if len(calls) == which:
                raise KeyboardInterrupt
            return real(*args, **kw)

        return dies

    # The last round takes the whole budget: it must be affordable again.
    for owner, name, which in (
        (Example, "train", 2),
        (Plain, "collect", 2),
        (Coordinator, "publish", 3),
        (rounds_of, "evaluate", 2),
        (Coordinator, "_save", 2),
        (Example, "train", 3),
        (Plain, "collect", 3),
        (Coordinator, "_save", 3),
    ):
        config = make_config(**given)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, dying(owner, name, which))
            with pytest.raises(KeyboardInterrupt):
                run(config)
        folder = run(resumed(config))
        same_bits(whole, folder)
        assert {c: [e.round for e in es] for c, es in ledger(folder).entries.items()} == {
            c: [0, 1, 2, 3] for c in CLIENTS
        }


def test_killed_in_the_last_round_with_unit_client_it_is_done_again(make_config, monkeypatch):
    given = dict(method__name="ffa", privacy={"epsilon": 8.0, "unit": "client"}, federation__rounds=2)
    whole = run(make_config(**given))
    config = make_config(**given)
    calls = []

    def dies(self, real=Coordinator._save):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Coordinator, "_save", dies)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    folder = run(resumed(config))
    same_bits(whole, folder)
    assert [e.round for e in ledger(folder).entries[EVERYONE]] == [1, 2]


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


# --- budgets ----------------------------------------------------------------------------------------------------


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


def test_what_would_not_be_private_is_refused(make_config):
    for wrong, words in (
        ({"privacy": {"delta": 1e-5}}, "privacy.delta without privacy.epsilon"),
        ({"privacy": {"unit": "client"}}, "privacy.unit without privacy.epsilon"),
        (
            {
                "privacy": {"epsilon": 1.0},
                "method": {"name": "fed-sb"},
                "adapter": {"kind": "lora-sb", "subspace": "gradient"},
            },
            "reads the clients' data without noise",
        ),
        (
            {
                "privacy": {"epsilon": 1.0},
                "method": {"name": "fed-sb"},
                "adapter": {"kind": "lora-sb", "subspace": "gradient-raw"},
            },
            "reads the clients' data without noise",
        ),
        (
            {"method": {"name": "fed-sb"}, "adapter": {"kind": "lora-sb", "subspace": "private"}},
            "needs privacy.epsilon",
        ),
        ({"privacy": {"epsilon": 1.0}, "data": {"client_held_out": 0.2}}, "client_held_out"),
        ({"privacy": {"epsilon": 1.0}, "method": {"name": "flora"}, "adapter": {"rank": [2, 1]}}, "one rank"),
        ({"privacy": {"epsilon": 1.0, "unit": "client"}, "method": {"name": "fedex"}}, "noise to the mean"),
        ({"privacy": {"epsilon": 1.0}, "model": {"dropout": 0.1}}, "model.dropout 0.1 would let one example change"),
        ({"privacy": {"noise": 1.0}, "adapter": {"dropout": 0.2}}, "adapter.dropout 0.2 would let one example change"),
        ({"privacy": {"epsilon": 1.0, "unit": "client"}, "method": {"name": "fedsa"}}, "keep factors of their own"),
        (
            {"privacy": {"epsilon": 1.0, "unit": "client"}, "method": {"name": "ffa", "weights": "examples"}},
            "use equal",
        ),
        (
            {"privacy": {"epsilon": 1.0, "unit": "client", "count_noise": 3.0}, "method": {"name": "ffa"}},
            "belongs to privacy.unit example",
        ),
        ({"privacy": {"epsilon": 1.0, "adaptive_clip": 0.5}}, "belongs to privacy.unit client"),
        ({"privacy": {"epsilon": 1.0, "subspace_fraction": 0.5}}, "belongs to adapter.subspace private"),
        (
            {"privacy": {"secure_aggregation": True}, "method": {"name": "fedex"}},
            "opens only the sum of the updates, and fedex needs each one",
        ),
        ({"privacy": {"secure_aggregation": True}, "method": {"name": "flora"}}, "flora needs each one"),
        (
            {"privacy": {"secure_aggregation": True}, "method": {"name": "fedsa"}},
            "with method fedsa the coordinator's checkpoint would hold",
        ),
        (
            {
                "privacy": {"secure_aggregation": True},
                "method": {"name": "fedit"},
                "federation": {"keep_optimizer": True},
            },
            "with federation.keep_optimizer the coordinator's",
        ),
        (
            {
                "privacy": {"secure_aggregation": True, "epsilon": 1.0, "unit": "client"},
                "method": {"name": "fedit"},
                "federation": {"keep_optimizer": True},
            },
            "from which its update can be read",
        ),
        ({"privacy": {"secure_threshold": 0.5}}, "belongs to privacy.secure_aggregation"),
        (
            {
                "privacy": {"epsilon": 1.0, "unit": "client", "secure_aggregation": True},
                "method": {"name": "ffa"},
                "federation": {"cohort": 3},
            },
            "every client in every round",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            from_dict(wrong)
    with pytest.raises(ConfigError, match="have 3 or more"):
        prepare(make_config(method__name="ffa", federation__clients=2, privacy={"secure_aggregation": True}))
    with pytest.raises(ConfigError, match="client 'client-0' has fewer examples than its batch_size 500"):
        prepare(make_config(task="classification", privacy={"noise": 1.0}, federation__batch_size=500))
    config = make_config(privacy={"epsilon": 1.0, "unit": "example", "clip": 0.1})
    assert from_dict(json.loads(config.model_dump_json())) == config


# --- both engines -----------------------------------------------------------------------------------------------

ENGINES = {
    "fed-sb, private subspace": PRIVATE["fed-sb, private subspace"],
    "clients": PRIVATE["clients"],
    "secure": {
        "method__name": "fed-sb",
        "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"},
        "privacy": {"epsilon": 8.0, "secure_aggregation": True},
    },
}


@pytest.mark.parametrize("name", [n if n == "secure" else pytest.param(n, marks=pytest.mark.slow) for n in ENGINES])
def test_private_runs_have_the_same_bits_on_ray(make_config, ray_session, name):
    same_bits(run(make_config(**ENGINES[name])), run(make_config(**ENGINES[name], engine="ray")))


@pytest.mark.parametrize("secure", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "secure"])
def test_a_worker_that_dies_repeats_its_draw_and_is_charged_once(make_config, ray_session, monkeypatch, secure):
    given = dict(method__name="ffa", privacy={"epsilon": 3.0, "secure_aggregation": secure})
    whole = run(make_config(**given))
    folder = run(sabotaged(make_config, monkeypatch, "dies", **given))
    assert (folder / "flag").exists()
    same_bits(whole, folder)
    assert {c: [e.round for e in es] for c, es in ledger(folder).entries.items()} == {c: [0, 1, 2, 3] for c in CLIENTS}


# --- secure sums ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ["lora+fedit", "lora+ffa", "lora+rolora", "lora-sb+fed-sb", "ravan+ravan"])
def test_a_secure_run_equals_the_plain_one_within_the_fixed_point_step(make_config, pair, monkeypatch):
    given = options(pair) | (
        {"adapter": {"kind": "lora-sb", "rank": 2, "subspace": "gradient-raw"}} if pair == "lora-sb+fed-sb" else {}
    )
    plain, config = run(make_config(**given)), make_config(**given, privacy={"secure_aggregation": True})
    received, fetch = [], pool_inline.InlinePool.fetch
    monkeypatch.setattr(
        pool_inline.InlinePool, "fetch", lambda self, sent: received.append(fetch(self, sent)) or received[-1]
    )
    prepared = prepare(config)
    execute(prepared)
    folder = Path(config.output.dir)
    a, b = final_tensors(plain), final_tensors(folder)
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

    def sealed(self, client, tensors, orders):
        clear.append(torch.cat([t.double().reshape(-1) for _, t in sorted(tensors.items())]))
        return real_seal(self, client, tensors, orders)

    monkeypatch.setattr(
        pool_inline.InlinePool, "fetch", lambda self, update: seen.append(real_fetch(self, update)) or seen[-1]
    )
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
    plain, secure = run(make_config(**given)), run(make_config(**given, privacy={"secure_aggregation": True}))
    a, b = final_tensors(plain), final_tensors(secure)
    assert all((a[n] - b[n]).abs().max() < 1e-7 for n in a)
    assert [[d["client"] for d in r["dropped"]] for r in rounds(secure)] == [[], ["client-1", "client-4"], []]
    monkeypatch.setattr(LocalTrainer, "train", fails(["client-0", "client-1", "client-4"]))
    with pytest.raises(PrivacyError, match="stays closed .*2 clients sent their part"):
        run(make_config(**given, privacy={"secure_aggregation": True}))
    # Nor do an error's words leave a private client.
    with pytest.raises(RoundError) as caught:
        run(make_config(**given | {"federation__quorum": 0.9}, privacy={"epsilon": 3.0}))
    assert "OSError" in str(caught.value) and "Smith" not in str(caught.value) + caught.value.details


# --- guards, and what is said -----------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_reaches_nobody(make_config):
    config = make_config(privacy={"noise": 1.0}, clients={"client-2": {"lr": 1e30, "local_steps": 5, "batch_size": 12}})
    with pytest.raises(
        ClientError, match="client 'client-2' failed: a (loss|gradient) is not finite: lower federation.lr"
    ) as caught:
        run(config)
    assert not caught.value.details
    assert not rounds(Path(config.output.dir)) if (Path(config.output.dir) / "rounds.jsonl").exists() else True


def test_the_run_directory_says_what_left_and_what_is_not_guaranteed(make_config, monkeypatch):
    monkeypatch.delenv(TEST_KEY)
    config = make_config(
        task="classification",
        method__name="fed-sb",
        adapter={"kind": "lora-sb", "rank": 2, "subspace": "private"},
        privacy={"epsilon": 4.0, "secure_aggregation": True},
    )
    (Path(config.output.dir).parent / "c.yaml").write_text(config.to_yaml())
    assert main(["run", "--config", str(Path(config.output.dir).parent / "c.yaml")]) == 0
    folder = Path(config.output.dir)
    told = json.loads((folder / "privacy.json").read_text())
    assert told["guarantee"]["epsilon"] == json.loads((folder / "summary.json").read_text())["epsilon"] <= 4.0
    assert (
        told["guarantee"]["void"] is None
        and told["guarantee"]["relation"] == "add-or-remove-one"
        and told["rounds"] == 3
    )
    assert {r["what"] for r in told["releases"]["client-0"]} == {"count", "subspace", "training"}
    words = json.dumps(told["left_each_client"])
    assert all(
        w in words for w in ("number of examples", "sketches", "trained factors", "secure sum", "identity of its key")
    )
    here = ROOT / "fedray"
    for entry in [*told["left_each_client"], *told["not_guaranteed"]]:
        place, _, name = entry["place"].partition(", ")
        source = (here / place).read_text()  # every place it names is there
        assert all(part in source for part in name.split(".") if part), entry
    assert {e["severity"] for e in told["not_guaranteed"]} == {"high", "medium", "low"}
    page = (folder / "report.html").read_text()
    assert (
        "What left each client" in page
        and "What is not guaranteed" in page
        and "<svg" in page
        and "epsilon spent" in page
    )
    # No count of anybody's examples stands anywhere: rates are of noised ones.
    counts = {
        c: len(d)
        for c, d in prepare(
            config.model_copy(update={"output": config.output.model_copy(update={"dir": None})})
        ).data.train.items()
    }
    noised = json.loads((folder / "checkpoint" / "ledger.json").read_text())["counts"]
    assert set(noised) == set(counts) and any(noised[c] != counts[c] for c in counts)


def test_a_client_does_not_follow_orders_that_its_own_config_does_not_allow(make_config, monkeypatch):
    for change in ({"noise": 0.3}, {"clip": 50.0}, {"rate": 1.0}):

        def generous(self, call, clients, real=Example._orders, change=change):
            orders, refused = real(self, call, clients)
            return {c: dataclasses.replace(o, **change) for c, o in orders.items()}, refused

        with monkeypatch.context() as patch:
            patch.setattr(Example, "_orders", generous)
            with pytest.raises(RoundError, match="the coordinator ordered .* it sends nothing"):
                run(make_config(method__name="ffa", privacy={"epsilon": 3.0, "count_noise": 2.0}))
    subspace = {"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"}}
    for privacy, change in (
        ({"epsilon": 3.0}, {"noise": 0.5}),
        ({"noise": 1.0}, {"noise": 0.5}),
        ({"epsilon": 3.0}, {"clip": 2.0}),
        ({"epsilon": 3.0}, {"rate": 1.1}),
    ):

        def generous_start(self, *question, real=Example._sketch_orders, change=change):
            return {c: dataclasses.replace(o, **change) for c, o in real(self, *question).items()}

        with monkeypatch.context() as patch:
            patch.setattr(Example, "_sketch_orders", generous_start)
            with pytest.raises(ClientError, match="the coordinator ordered .* it sends nothing"):
                run(make_config(**subspace, privacy=privacy | {"count_noise": 2.0}))

    # Noise that would be enough if the bases had cost nothing is not enough after them.
    def as_if_free(self, call, clients, real=Example._orders):
        orders, refused = real(self, call, clients)
        plan = self.ledger.plans["client-0"]
        noise = calibrate(plan.rate, plan.steps, plan.delta, plan.budget, [r for r in plan.before if r.what == "count"])
        assert noise < plan.noise
        return {c: dataclasses.replace(o, noise=noise) for c, o in orders.items()}, refused

    with monkeypatch.context() as patch:
        patch.setattr(Example, "_orders", as_if_free)
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


def test_a_key_lost_during_the_start_is_charged_anew_when_the_run_goes_on(make_config, monkeypatch):
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
    folder = run(resumed(config))
    subspaces = {c: [e.draw for e in es if e.release.what == "subspace"] for c, es in ledger(folder).entries.items()}
    # Other columns of client-1 gave another Q, so all answered about rows twice: two releases of theirs, and none is
    # free.
    assert [len(set(subspaces[c])) for c in CLIENTS] == [len(subspaces[c]) for c in CLIENTS] == [3, 4, 3]
    assert all(
        e.release.steps == 1 for es in ledger(folder).entries.values() for e in es if e.release.what == "subspace"
    )


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

    def dies(self, call, clients, real=Example._orders):  # after the round is charged, before its answer is kept
        told = real(self, call, clients)
        if call.round == 1:
            raise KeyboardInterrupt
        return told

    with monkeypatch.context() as patch:
        patch.setattr(Example, "_orders", dies)
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


def test_what_clients_say_of_the_clip_moves_by_a_half_for_one_client(make_config, monkeypatch):
    """The noise on it is paid for with sensitivity 1/2 (Andrew et al., 2021)."""
    told, sent = [], []
    real, clipped = client_level.next_clip, ClippingSide.changed
    monkeypatch.setattr(
        client_level,
        "next_clip",
        lambda clip, q, within, *rest: told.append(within) or real(clip, q, within, *rest),
    )
    monkeypatch.setattr(ClippingSide, "changed", lambda self, *args: sent.append(clipped(self, *args)) or sent[-1])
    for secure in (False, True):
        told.clear(), sent.clear()
        folder = run(
            make_config(
                method__name="ffa",
                privacy={
                    "noise": 0.5,
                    "unit": "client",
                    "clip": 0.05,
                    "adaptive_clip": 0.5,
                    "secure_aggregation": secure,
                },
            )
        )
        bits = [s[client_level.WITHIN].item() for s in sent]
        assert len(bits) == 9 and set(bits) <= {0.5, -0.5}
        assert told == pytest.approx([sum(bits[i : i + 3]) for i in (0, 3, 6)], abs=1e-6) and len(rounds(folder)) == 3


@pytest.mark.parametrize("privacy", [{"epsilon": 3.0}, {"epsilon": 8.0, "unit": "client"}], ids=["example", "client"])
@pytest.mark.parametrize("fixed_first", [True, False])
def test_a_key_that_was_fixed_for_any_part_of_a_run_voids_the_guarantee(make_config, monkeypatch, privacy, fixed_first):
    config = make_config(method__name="ffa", privacy=privacy, federation__rounds=3)
    word = os.environ[TEST_KEY]
    if not fixed_first:
        monkeypatch.delenv(TEST_KEY)
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    monkeypatch.delenv(TEST_KEY) if fixed_first else monkeypatch.setenv(TEST_KEY, word)
    told = json.loads((run(resumed(config)) / "privacy.json").read_text())["guarantee"]
    assert told["epsilon"] is None and TEST_KEY in told["void"]


def test_forgetting_a_run_that_will_not_go_on_removes_its_keys(make_config, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(TEST_KEY)
    for privacy, count in (({"epsilon": 3.0}, 3), ({"epsilon": 8.0, "unit": "client"}, 1)):
        config = make_config(method__name="ffa", privacy=privacy | {"key_dir": str(tmp_path / "keys")})
        with monkeypatch.context() as patch:
            killed_after(patch, 2)
            with pytest.raises(KeyboardInterrupt):
                run(config)
        folder = Path(config.output.dir)
        assert len([p for p in (tmp_path / "keys").rglob("*") if p.is_file()]) == count
        assert not [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size == 32]
        assert main(["forget", str(folder)]) == 0 and f"{count} noise key" in capsys.readouterr().out
        assert not list((tmp_path / "keys").iterdir())
    assert (
        main(["forget", str(run(make_config(method__name="ffa")))]) == 2 and "no private run" in capsys.readouterr().err
    )


def test_an_error_does_not_say_who_was_drawn(make_config, monkeypatch):
    def fails(self, view, client, *args):
        raise RuntimeError("gone")

    monkeypatch.setattr(LocalTrainer, "train", fails)
    with pytest.raises(RoundError) as caught:
        run(
            make_config(
                method__name="ffa",
                privacy={"noise": 1.0, "unit": "client"},
                federation__cohort=2,
                federation__clients=6,
            )
        )
    assert "client-" not in str(caught.value) + getattr(
        caught.value, "details", ""
    ) and "a client: RuntimeError" in str(caught.value)


def test_what_is_called_private_is(make_config, capsys):
    from fedray.report.console import run_privacy

    summary = {"epsilon": 3.0, "delta": 1e-5, "keys_were_fixed": False}
    assert run_privacy(summary).startswith("private: epsilon 3 at delta 1e-05")
    assert run_privacy(summary | {"epsilon": 2e6}).startswith("hardly private: epsilon 2e+06")
    assert run_privacy(summary | {"keys_were_fixed": True}).startswith("not private")
    told = json.loads((run(make_config(method__name="ffa", privacy={"noise": 1e-2})) / "privacy.json").read_text())
    assert told["guarantee"]["void"]


def test_a_run_whose_ledger_is_gone_is_not_resumed(make_config, monkeypatch):
    config = make_config(method__name="ffa", privacy={"epsilon": 3.0})
    killed_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    (Path(config.output.dir) / "checkpoint" / "ledger.json").unlink()
    with pytest.raises(ConfigError, match="lost its checkpoint/ledger.json, so nobody knows what it has spent"):
        run(resumed(config))


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


def test_exactness_of_a_noised_sum_says_nothing_of_the_sum(make_config):
    told = []
    for lr in (1e-2, 1e-7):
        config = make_config(
            method__name="ffa", privacy={"noise": 1.0, "unit": "client", "secure_aggregation": True}, federation__lr=lr
        )
        told += [[r["exactness"] for r in rounds(run(config))]]
    assert all(0 < e < 1e-5 for each in told for e in each) and max(told[1]) < 10 * max(told[0])


def test_report_of_a_run_that_is_not_finished(make_config, monkeypatch, tmp_path, capsys):
    config = make_config(method__name="ffa")
    killed_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    folder = Path(config.output.dir)
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert "not finished: 2 rounds so far" in page and "<svg" in page and "Privacy" not in page
    assert main(["report", str(tmp_path)]) == 2 and "no run directory with a finished round" in capsys.readouterr().err
    assert main(["report"]) == 2


def test_a_fixed_key_voids_the_guarantee(make_config):
    folder = run(make_config(method__name="ffa", privacy={"epsilon": 4.0}))
    told = json.loads((folder / "privacy.json").read_text())
    assert os.environ[TEST_KEY] and TEST_KEY in told["guarantee"]["void"] and told["guarantee"]["epsilon"] is None


def test_plan_shows_noise_steps_epsilon_and_signal_before_anything_runs(make_config, tmp_path, capsys):
    config = make_config(
        method__name="ffa",
        privacy={"epsilon": 2.0},
        clients={"client-1": {"local_steps": 5}, "client-0": {}, "client-2": {}},
    )
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert main(["plan", "--config", str(tmp_path / "c.yaml"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["privacy"]
    assert list(told) == list(CLIENTS) and [told[c]["steps"] for c in CLIENTS] == [6, 15, 6]
    for p in told.values():
        assert p["noise"] > 0 and 1.95 < p["epsilon"] <= 2.0 and 0 < p["signal_to_noise"] < 10 and p["delta"] == 1e-3
    assert main(["plan", "--config", str(tmp_path / "c.yaml")]) == 0
    assert "privacy by example" in capsys.readouterr().out
    assert not Path(config.output.dir).exists()


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
