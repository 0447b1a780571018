"""Updates that moved too far, or were lost, are left out and named; those of a sum cannot be judged, which is said."""

import numpy as np
import pytest
import torch
from support import final_tensors, rounds, run

from fedray.adapters import ADAPTERS, Layer
from fedray.errors import ClientError, ConfigError, LostError, RoundError
from fedray.federation import pool_inline
from fedray.federation.screening import Norms, norm
from fedray.federation.wire import Packet
from fedray.methods import METHODS, Increment, Spec
from fedray.methods.base import check_state

FAR = {"clients": {"client-1": {"lr": 5.0}}, "federation__max_grad_norm": None, "federation__optimizer": "adamw"}


@pytest.mark.parametrize("bound", [{"max_update_norm": 5.0}, {"max_update_ratio": 3.0}])
@pytest.mark.parametrize("method", ["fedit", "fedex", "fedsa"])
def test_an_update_that_moved_too_far_is_left_out_and_the_round_goes_on(make_config, method, bound):
    bounded = {f"federation__{option}": value for option, value in bound.items()}
    folder = run(make_config(method__name=method, federation__quorum=0.6, **FAR, **bounded))
    for record in rounds(folder):
        (out,) = record["dropped"]
        assert out["client"] == "client-1" and f"above federation.{next(iter(bound))}" in out["reason"]
    unbounded = run(make_config(method__name=method, federation__quorum=0.6, **FAR))
    assert not any(record["dropped"] for record in rounds(unbounded))
    size = {f: max(t.abs().max().item() for t in final_tensors(f).values()) for f in (folder, unbounded)}
    assert size[folder] < size[unbounded]


def test_it_counts_against_the_quorum(make_config):
    with pytest.raises(ClientError, match="client 'client-1' failed: its update has norm .*, above federation.max_up"):
        run(make_config(**FAR, federation__max_update_norm=5.0))
    with pytest.raises(RoundError, match="2 of 3 clients reported and 3 are needed .*: client 'client-1': its update"):
        run(make_config(**FAR, federation__max_update_norm=5.0, federation__quorum=0.9))


def test_a_client_that_is_asked_again_is_held_against_the_norms_of_all(make_config):
    """Alone in its second attempt it would be its own median."""
    with pytest.raises(ClientError, match="client-1.*above federation.max_update_ratio 3 times the cohort's median"):
        run(make_config(**FAR, federation__max_update_ratio=3.0))


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"secure_aggregation": True}, "lets nobody see one update: leave federation.max_update_ratio out"),
        ({"unit": "client", "noise": 1.0}, "clipped to privacy.clip: leave federation.max_update_ratio out"),
    ],
)
def test_a_bound_on_what_nobody_sees_is_refused(make_config, privacy, words):
    with pytest.raises(ConfigError, match=words):
        make_config(method__name="ffa", privacy=privacy, federation__max_update_ratio=2.0)


def test_norms_are_those_of_the_whole_vector_and_say_what_is_not_finite():
    g = np.random.default_rng(0)
    a, b = (g.normal(size=3 * (1 << 20) + 5).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(norm(a), np.linalg.norm(a.astype(np.float64)), rtol=1e-12)
    np.testing.assert_allclose(norm(a, b), np.linalg.norm(a.astype(np.float64) - b), rtol=1e-12)
    a[-1] = np.nan
    assert not np.isfinite(norm(a)) and np.isfinite(norm(np.full(10, 3e38, np.float32)))


def test_two_norms_have_no_median():
    norms = Norms(None, 2.0)
    for client, size in (("a", 1.0), ("b", 100.0)):
        norms.add(client, Packet((("x", (1,)),), np.array([size], np.float32)), {"x": torch.zeros(1)})
    assert not norms.flaws()


def test_an_update_that_was_lost_with_its_node_is_asked_for_again(make_config, monkeypatch):
    real, lost = pool_inline.InlinePool.fetch, []

    def once(self, update):
        if not lost:
            lost.append(1)
            raise LostError("what it sent was lost: its node died")
        return real(self, update)

    monkeypatch.setattr(pool_inline.InlinePool, "fetch", once)
    folder = run(make_config())
    assert lost and not any(record["dropped"] for record in rounds(folder))


def test_a_state_that_is_not_finite_is_not_published(make_config):
    spec = Spec(ADAPTERS["lora"](), (Layer("x", 4, 4, 2, 1.0),), 0)
    state = METHODS["fedit"]().init(spec)
    bad = {"x.base_A": torch.tensor([float("inf")])}
    with pytest.raises(RoundError, match="their aggregate is not, in x.base_A"):
        check_state(state, state.replace(increments=(Increment(1, bad),)))
    check_state(state.replace(increments=(Increment(1, bad),)), state.replace(increments=(Increment(1, bad),)))
