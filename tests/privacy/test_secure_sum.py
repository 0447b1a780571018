"""Secure aggregation: sums are right whoever drops out, below the threshold they stay closed, and what is seen says
nothing."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedray.errors import PrivacyError
from fedray.privacy import secure_sum as secure
from fedray.privacy.keys import Key, Stream

NAMES = [f"client {i}" for i in range(31)]
KEYS = {name: Key(hashlib.sha256(name.encode()).digest()) for name in NAMES}


def play(count, size, drops=(), threshold=None, values=None, name="session"):
    """One sum. `drops`: who is gone before sharing, before sending, before revealing."""
    members = tuple(NAMES[:count])
    session = secure.Session(name, members, threshold or secure.default_threshold(count))
    before_share, before_send, before_reveal = (set(d) for d in (*drops, *[()] * (3 - len(drops))))
    adverts = {c: secure.advertise(KEYS[c], session) for c in members}
    sealed = {c: secure.share(KEYS[c], c, session, adverts) for c in members if c not in before_share}
    adverts_2 = {c: adverts[c] for c in sealed}
    values = (
        values if values is not None else {c: np.random.default_rng(i).normal(size=size) for i, c in enumerate(members)}
    )
    masked = {
        c: secure.mask(KEYS[c], c, session, adverts_2, secure.encode(values[c], count))
        for c in sealed
        if c not in before_send
    }
    revealed = {
        c: secure.reveal(KEYS[c], c, session, adverts_2, {o: sealed[o][c] for o in sealed}, list(masked))
        for c in masked
        if c not in before_reveal
    }
    total = secure.decode(secure.unmask(session, members, adverts_2, masked, revealed))
    return total, sum(values[c] for c in masked), masked, values


def third(names, seed):
    picked = np.random.default_rng(seed).permutation(list(names))[: len(names) // 3]
    return [str(p) for p in picked]


@pytest.mark.parametrize("count", [3, 4, 5, 7, 13, 20, 31])
@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_the_sum_is_right_when_up_to_a_third_drops_at_a_stage(count, stage):
    drops = [third(NAMES[:count], count) if i == stage else [] for i in range(3)]
    total, wanted, *_ = play(count, 257, drops)
    assert np.abs(total - wanted).max() <= count * secure.STEP / 2 + 1e-12


@pytest.mark.parametrize("count", [9, 13, 31])
def test_the_sum_is_right_when_a_third_of_who_is_left_drops_at_every_stage(count):
    left, drops = NAMES[:count], []
    for stage in range(3):
        drops.append(third(left, stage))
        left = [c for c in left if c not in drops[-1]]
    total, wanted, masked, _ = play(count, 100, drops, threshold=secure.threshold_of(0.25, count))
    assert len(masked) < 0.5 * count + 1
    assert np.abs(total - wanted).max() <= count * secure.STEP / 2 + 1e-12


def test_below_the_threshold_nothing_opens():
    with pytest.raises(PrivacyError, match="nothing is revealed"):
        play(5, 10, [[], NAMES[:3]])
    with pytest.raises(PrivacyError, match="stays closed"):
        play(5, 10, [[], [], NAMES[:3]])
    with pytest.raises(PrivacyError, match="3 are needed"):
        play(5, 10, [NAMES[:3]])
    with pytest.raises(PrivacyError, match="3 clients or more"):
        play(2, 10)


def test_fewer_shares_than_the_threshold_say_nothing_and_as_many_say_all():
    secret = bytes(range(32))
    shares = dict(enumerate(secure.split(secret, 7, 4, Stream(b"s" * 32)), start=1))
    for points in ([1, 2, 3, 4], [7, 5, 2, 1], [1, 2, 3, 4, 5, 6, 7]):
        assert secure.join({x: shares[x] for x in points}) == secret
    with pytest.raises(PrivacyError):
        secure.join({x: shares[x] for x in (1, 2, 3)})
    # For any other secret there is a fourth share that makes three given ones mean it.
    three = {x: shares[x] for x in (1, 2, 3)}
    for other in (bytes(32), b"\xff" * 32, bytes(reversed(secret))):
        weight = 1
        for x in three:
            weight = weight * -x * pow(4 - x, -1, secure.PRIME) % secure.PRIME
        without = (int.from_bytes(secret, "big") - shares[4] * weight) % secure.PRIME
        fourth = (int.from_bytes(other, "big") - without) * pow(weight, -1, secure.PRIME) % secure.PRIME
        assert secure.join(three | {4: fourth}) == other


def test_what_is_seen_of_a_client_is_uniform_and_the_same_values_never_look_the_same():
    zeros = {c: np.zeros(200_000) for c in NAMES[:3]}
    _, _, masked, _ = play(3, 200_000, values=zeros)
    ones = {c: np.ones(200_000) for c in NAMES[:3]}
    _, _, masked_ones, _ = play(3, 200_000, values=ones, name="other")
    for seen in [*masked.values(), *masked_ones.values()]:
        counts = np.bincount(np.frombuffer(seen.tobytes(), dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        high = (seen >> np.uint64(32)).astype(np.float64) / 2**32
        assert stats.kstest(high, "uniform").pvalue > 1e-6
        assert abs(np.corrcoef(high[:-1], high[1:])[0, 1]) < 0.02
    every = [*masked.values(), *masked_ones.values()]
    assert all((a != b).mean() > 0.999 for i, a in enumerate(every) for b in every[:i])


def test_one_mask_alone_is_left_when_the_coordinator_knows_all_but_the_clients_own():
    """Even with every pairwise mask taken away, the own mask still hides the vector."""
    members = tuple(NAMES[:3])
    session = secure.Session("s", members, 2)
    adverts = {c: secure.advertise(KEYS[c], session) for c in members}
    seen = secure.mask(KEYS[members[0]], members[0], session, adverts, np.zeros(100_000, dtype=np.uint64))
    for other in members[1:]:
        private = secure._private(KEYS[other], session, "mask")
        seen = seen + secure._pairwise(private, other, members[0], adverts[members[0]], session, len(seen))
    assert np.array_equal(seen, Stream(secure._seed(KEYS[members[0]], session)).integers(len(seen)))
    assert stats.chisquare(np.bincount(np.frombuffer(seen.tobytes(), dtype=np.uint8), minlength=256)).pvalue > 1e-6


def test_a_client_reveals_one_or_the_other_secret_of_each_and_never_both():
    members = tuple(NAMES[:4])
    session = secure.Session("s", members, 3)
    adverts = {c: secure.advertise(KEYS[c], session) for c in members}
    sealed = {c: secure.share(KEYS[c], c, session, adverts) for c in members}
    mine = {o: sealed[o][members[0]] for o in members}
    told = secure.reveal(KEYS[members[0]], members[0], session, adverts, mine, members[:3])
    assert set(told) == set(members)
    seeds = secure.split(
        secure._seed(KEYS[members[1]], session),
        4,
        3,
        KEYS[members[1]].stream("secure sum", "polynomial", "own mask", "s", *members),
    )
    keys = secure.split(
        secure._private(KEYS[members[3]], session, "mask").private_bytes_raw(),
        4,
        3,
        KEYS[members[3]].stream("secure sum", "polynomial", "mask", "s", *members),
    )
    assert told[members[1]] == seeds[0] and told[members[3]] == keys[0]
    with pytest.raises(PrivacyError, match="did not arrive as it was sent"):
        secure.reveal(
            KEYS[members[0]],
            members[0],
            session,
            adverts,
            mine | {members[1]: mine[members[1]][:-1] + b"\0"},
            members[:3],
        )
    with pytest.raises(PrivacyError, match="lost in between"):
        secure.mask(KEYS[members[1]], members[0], session, adverts, np.zeros(3, dtype=np.uint64))


def test_what_does_not_fit_together_is_refused():
    members = tuple(NAMES[:4])
    session = secure.Session("s", members, 3)
    adverts = {c: secure.advertise(KEYS[c], session) for c in members}
    sealed = {c: secure.share(KEYS[c], c, session, adverts) for c in members}
    mine = {c: {o: sealed[o][c] for o in members} for c in members}
    with pytest.raises(PrivacyError, match="names a client twice"):
        secure.Session("s", ("a", "a", "b"), 2)
    with pytest.raises(PrivacyError, match="is said not to have sent"):
        secure.reveal(KEYS[members[3]], members[3], session, adverts, mine[members[3]], members[:3])
    masked = {c: secure.mask(KEYS[c], c, session, adverts, np.ones(5, dtype=np.uint64)) for c in members[:3]}
    revealed = {c: secure.reveal(KEYS[c], c, session, adverts, mine[c], members[:3]) for c in members[:3]}
    assert secure.unmask(session, members, adverts, masked, revealed).tolist() == [3] * 5
    for subject, words in ((members[0], "open another mask"), (members[3], "open another key|do not fit together")):
        changed = revealed | {members[1]: revealed[members[1]] | {subject: revealed[members[1]][subject] ^ 1}}
        with pytest.raises(PrivacyError, match=f"{words}|do not fit together"):
            secure.unmask(session, members, adverts, masked, changed)
    with pytest.raises(PrivacyError, match="nobody sent"):
        secure.unmask(session, members, adverts, {}, revealed)


def test_repeated_steps_give_the_same_bytes_and_sessions_differ():
    one, two = (play(3, 50, name="a")[2] for _ in range(2))
    other = play(3, 50, name="b")[2]
    assert all(np.array_equal(one[c], two[c]) and not np.array_equal(one[c], other[c]) for c in one)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=20), st.integers(3, 31))
def test_fixed_point(values, members):
    x = np.array(values)
    back = secure.decode(sum((secure.encode(x, members) for _ in range(members)), np.zeros(len(x), dtype=np.uint64)))
    assert np.abs(back - members * x).max() <= members * secure.STEP / 2 + 1e-9
    for wrong in (np.array([2.0**31 / members]), np.array([np.nan]), np.array([-np.inf])):
        with pytest.raises(PrivacyError, match="not below"):
            secure.encode(wrong, members)
