"""Secure sums in whole runs: equal to the plain ones, never an update in clear, never opened twice."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from private_runs import resumed
from scipy import stats
from support import final_tensors, options, rounds, run

from fedray.errors import PrivacyError, RoundError
from fedray.federation import pool_inline
from fedray.federation.channels.secure import Masked
from fedray.federation.coordinator import Coordinator
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.plan import plan
from fedray.privacy import secure_sum
from fedray.training.local import LocalTrainer


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

    def sealed(self, client, tensors, orders, asked):
        clear.append(torch.cat([t.double().reshape(-1) for _, t in sorted(tensors.items())]))
        return real_seal(self, client, tensors, orders, asked)

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
