"""Client-level privacy: the clip, the secret cohort, and the last round done again."""

import pytest
from private_runs import ledger, resumed
from support import rounds, run, same_bits

from fedray.errors import RoundError
from fedray.federation.channels.client import ClippingSide
from fedray.federation.coordinator import Coordinator
from fedray.privacy import client_level
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
