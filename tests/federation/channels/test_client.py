"""Client-level privacy: the clip, the secret cohort, and the last round done again."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from private_runs import ledger, resumed
from support import rounds, run, same_bits

from fedray.config.read import from_dict
from fedray.errors import ConfigError, RoundError
from fedray.federation.channels.client import ClippingSide
from fedray.federation.channels.masked import Masked
from fedray.federation.coordinator import Coordinator
from fedray.federation.listening import Silent
from fedray.federation.pool_inline import InlinePool
from fedray.federation.prepare import prepare
from fedray.federation.run import execute
from fedray.privacy import client_level, secure_sum
from fedray.privacy.keys import TEST_KEY, KeyStore
from fedray.privacy.ledger import EVERYONE
from fedray.training.local import LocalTrainer


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


def test_exactness_of_a_noised_sum_says_nothing_of_the_sum(make_config):
    told = []
    for lr in (1e-2, 1e-7):
        config = make_config(
            method__name="ffa", privacy={"noise": 1.0, "unit": "client", "secure_aggregation": True}, federation__lr=lr
        )
        told += [[r["exactness"] for r in rounds(run(config))]]
    assert all(0 < e < 1e-5 for each in told for e in each) and max(told[1]) < 10 * max(told[0])


SAMPLED = {
    "method__name": "ffa",
    "privacy": {"noise": 1.0, "unit": "client", "delta": 0.01},
    "federation__clients": 6,
    "federation__cohort": 2,
    "federation__rounds": 6,
}


@pytest.mark.parametrize("start", [{}, {"kind": "lora-sb", "rank": 2}])
def test_nothing_that_is_written_tells_who_was_drawn_or_how_many(make_config, monkeypatch, start):
    """Bytes, what each client has had, the progress of a round: all the same whatever the sample was."""
    method = {"adapter": start, "method__name": "fed-sb"} if start else {}
    sizes, progress, written = [], [], []

    class Follows(Silent):
        def progress(self, *args):
            progress.append(args)

    for seed in ("one", "other"):
        monkeypatch.setenv(TEST_KEY, seed)
        drawn = []

        def counted(self, handle, round, clients, *call, real=InlinePool.train, drawn=drawn):
            drawn.append(tuple(clients))
            return real(self, handle, round, clients, *call)

        with monkeypatch.context() as patch:
            patch.setattr(InlinePool, "train", counted)
            config = make_config(**SAMPLED | method)
            execute(prepare(config), Follows())
        folder = Path(config.output.dir)
        sizes.append(drawn)
        records = [{k: r[k] for k in ("bytes_up", "bytes_down", "cohort", "dropped")} for r in rounds(folder)]
        newest = sorted((folder / "checkpoint").glob("round-*"))[-1]
        state = json.loads((newest / "state.json").read_text())
        written.append((records, state["seen"], state["kept"]))
    assert sizes[0] != sizes[1] and len({len(clients) for clients in sizes[0]}) > 1 and not progress
    assert written[0] == written[1]
    records, seen, kept = written[0]
    assert len(set(seen.values())) == 1 and kept == [] and all(r["bytes_up"] > 0 for r in records)


def test_an_optimizer_state_of_drawn_clients_is_not_left_in_the_checkpoint(make_config):
    with pytest.raises(ConfigError, match="keep_optimizer would leave the optimizer state of each client"):
        make_config(**SAMPLED, federation__keep_optimizer=True)


@pytest.mark.parametrize("said", [1e6, -1e6, 0.0, 0.51])
@pytest.mark.parametrize("secure", [True, False])
def test_one_client_does_not_set_the_clip_of_all(make_config, monkeypatch, said, secure):
    real = ClippingSide.changed

    def lies(self, client, *call):
        update = real(self, client, *call)
        return update | ({client_level.WITHIN: torch.tensor([said])} if client == "client-1" else {})

    monkeypatch.setattr(ClippingSide, "changed", lies)
    privacy = {"noise": 1.0, "unit": "client", "adaptive_clip": 0.5, "secure_aggregation": secure, "delta": 0.01}
    folder = run(make_config(method__name="ffa", privacy=privacy, federation__quorum=0.5))
    for record in rounds(folder):
        # Noise aside, the share within the clip lies between 0 and 1.
        assert abs(math.log(record["next_clip"] / record["clip"])) < client_level.CLIP_LR * (0.5 + 6 * 1.0 / 3)
        assert len(record["dropped"]) == (0 if secure else 1)


def test_what_is_not_clipped_is_left_out(make_config, monkeypatch):
    real = ClippingSide.changed

    def unclipped(self, client, *call):
        return {n: t * (3.0 if client == "client-1" else 1.0) for n, t in real(self, client, *call).items()}

    monkeypatch.setattr(ClippingSide, "changed", unclipped)
    privacy = {"noise": 1.0, "unit": "client", "clip": 0.01}
    folder = run(make_config(method__name="ffa", privacy=privacy, federation__quorum=0.5))
    assert all(len(record["dropped"]) == 1 for record in rounds(folder))
    with pytest.raises(RoundError, match="a client: its update is beyond the clip: its worker does not run"):
        run(make_config(method__name="ffa", privacy=privacy))


@given(st.integers(1, 4000), st.floats(1e-6, 10.0), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_rounding_to_fixed_point_does_not_pass_the_clip(numbers, clip, seed):
    """What a sum of integers moves by for one client is at most the clip, rounding included."""
    sealer = Masked(from_dict({}), KeyStore("unused"), lambda client: 1)
    rounding = sealer.rounding(numbers)
    assume(rounding < clip)
    update = {"x": torch.randn(numbers, generator=torch.Generator().manual_seed(seed)) * 100 * clip}
    clipped, _ = client_level.clipped(update, clip - rounding)
    sent = secure_sum.decode(secure_sum.encode(clipped["x"].double().numpy(), 3))
    assert np.linalg.norm(sent) <= clip


def test_a_clip_that_fixed_point_drowns_is_refused(make_config):
    privacy = {"noise": 1.0, "unit": "client", "clip": 1e-9, "secure_aggregation": True}
    with pytest.raises(RoundError, match="no larger than what the fixed point of a secure sum rounds: it sends"):
        run(make_config(method__name="ffa", privacy=privacy))
