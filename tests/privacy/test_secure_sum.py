"""Secure aggregation: sums are right whoever drops out, below the threshold they stay closed, and what is seen says
nothing."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from secure_sums import KEYS, NAMES, UNSIGNED, Coordinator, parties, session_of

from fedray.errors import PrivacyError
from fedray.privacy import secure_sum as secure
from fedray.privacy.keys import Key, Stream
from fedray.privacy.sums import keys as sum_keys
from fedray.privacy.sums import neighbours as graph
from fedray.privacy.sums import shamir


def play(folder, count, size, drops=(), values=None, name="session", rule=UNSIGNED):
    """One sum. `drops`: who is gone before sharing, before sending, before revealing."""
    members = NAMES[:count]
    before_share, before_send, before_reveal = (set(d) for d in (*drops, *[()] * (3 - len(drops))))
    if values is None:
        values = {c: np.random.default_rng(i).normal(size=size) for i, c in enumerate(members)}
    server = Coordinator(session_of(count, name, rule), rule, parties(folder, members, rule))
    server.advertise(members)
    server.share([c for c in members if c not in before_share])
    server.mask([c for c in server.sealed if c not in before_send], values)
    server.sign([c for c in server.masked if c not in before_reveal])
    server.reveal(server.signatures)
    return server.open(), sum(values[c] for c in server.masked), server.masked, values


def share_of(names, share, seed):
    picked = np.random.default_rng(seed).permutation(list(names))[: int(len(names) * share)]
    return [str(p) for p in picked]


@pytest.mark.parametrize("count", [3, 4, 5, 7, 13, 20, 31])
@pytest.mark.parametrize("stage", [None, 0, 1, 2])
def test_the_sum_is_right_when_up_to_a_third_drops_at_a_stage(tmp_path, count, stage):
    drops = [share_of(NAMES[:count], 1 / 3, count) if i == stage else [] for i in range(3)]
    total, wanted, *_ = play(tmp_path, count, 257, drops)
    assert np.abs(total - wanted).max() <= count * secure.STEP / 2 + 1e-12


@pytest.mark.parametrize("count", [9, 13, 31])
def test_the_sum_is_right_when_a_sixth_of_who_is_left_drops_at_every_stage(tmp_path, count):
    left, drops = NAMES[:count], []
    for stage in range(3):
        drops.append(share_of(left, 1 / 6, stage))
        left = [c for c in left if c not in drops[-1]]
    total, wanted, masked, _ = play(tmp_path, count, 100, drops)
    assert len(left) < len(masked) < count
    assert np.abs(total - wanted).max() <= count * secure.STEP / 2 + 1e-12
    # To the last bit: the masks cancel.
    exact = sum(secure.encode(np.random.default_rng(NAMES.index(c)).normal(size=100), count) for c in masked)
    assert np.array_equal(total, secure.decode(exact))


def test_below_the_threshold_nothing_opens(tmp_path):
    with pytest.raises(PrivacyError, match="nothing is revealed"):
        play(tmp_path / "a", 5, 10, [[], NAMES[:3]])
    with pytest.raises(PrivacyError, match="2 clients signed .*3 are needed: nothing is revealed"):
        play(tmp_path / "b", 5, 10, [[], [], NAMES[:3]])
    with pytest.raises(PrivacyError, match="3 are needed"):
        play(tmp_path / "c", 5, 10, [NAMES[:3]])
    with pytest.raises(PrivacyError, match="3 clients or more"):
        play(tmp_path / "d", 2, 10)
    server = Coordinator(session_of(5), UNSIGNED, parties(tmp_path / "e", NAMES[:5]))
    everyone = NAMES[:5]
    server.advertise(everyone)
    server.share(everyone)
    server.mask(everyone, dict.fromkeys(everyone, np.ones(3)))
    server.sign(everyone)
    server.reveal(everyone[:2])
    with pytest.raises(PrivacyError, match="2 clients of a secure sum stayed to the end.*stays closed"):
        server.open()


def test_fewer_shares_than_the_threshold_say_nothing_and_as_many_say_all():
    secret = bytes(range(32))
    shares = shamir.split(secret, range(1, 8), 4, Stream(b"s" * 32))
    for points in ([1, 2, 3, 4], [7, 5, 2, 1], [1, 2, 3, 4, 5, 6, 7]):
        assert shamir.join({x: shares[x] for x in points}) == secret
    assert shamir.split(secret, [6], 4, Stream(b"s" * 32)) == {6: shares[6]}
    with pytest.raises(PrivacyError):
        shamir.join({x: shares[x] for x in (1, 2, 3)})
    # For any other secret there is a fourth share that makes three given ones mean it.
    three = {x: shares[x] for x in (1, 2, 3)}
    for other in (bytes(32), b"\xff" * 32, bytes(reversed(secret))):
        weight = 1
        for x in three:
            weight = weight * -x * pow(4 - x, -1, shamir.PRIME) % shamir.PRIME
        without = (int.from_bytes(secret, "big") - shares[4] * weight) % shamir.PRIME
        fourth = (int.from_bytes(other, "big") - without) * pow(weight, -1, shamir.PRIME) % shamir.PRIME
        assert shamir.join(three | {4: fourth}) == other


def test_what_is_seen_of_a_client_is_uniform_and_the_same_values_never_look_the_same(tmp_path):
    zeros = {c: np.zeros(200_000) for c in NAMES[:3]}
    _, _, masked, _ = play(tmp_path, 3, 200_000, values=zeros)
    ones = {c: np.ones(200_000) for c in NAMES[:3]}
    _, _, masked_ones, _ = play(tmp_path, 3, 200_000, values=ones, name="other")
    for seen in [*masked.values(), *masked_ones.values()]:
        counts = np.bincount(np.frombuffer(seen.tobytes(), dtype=np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
        high = (seen >> np.uint64(32)).astype(np.float64) / 2**32
        assert stats.kstest(high, "uniform").pvalue > 1e-6
        assert abs(np.corrcoef(high[:-1], high[1:])[0, 1]) < 0.02
    every = [*masked.values(), *masked_ones.values()]
    assert all((a != b).mean() > 0.999 for i, a in enumerate(every) for b in every[:i])


def test_one_mask_alone_is_left_when_the_coordinator_knows_all_but_the_clients_own(tmp_path):
    """Even with every pairwise mask taken away, the own mask still hides the vector."""
    members = NAMES[:3]
    server = Coordinator(session_of(3), UNSIGNED, parties(tmp_path, members))
    server.advertise(members)
    server.share(members)
    seen, own = (
        server.mask_one(members[0], np.zeros(100_000)),
        sum_keys.Secrets(KEYS[NAMES[0]], NAMES[0], session_of(3)),
    )
    for other in members[1:]:
        theirs = sum_keys.Secrets(KEYS[other], other, session_of(3))
        seen = seen + theirs.pairwise(members[0], server.adverts[members[0]].mask, len(seen))
    assert np.array_equal(seen, Stream(own.seed).integers(len(seen)))
    assert stats.chisquare(np.bincount(np.frombuffer(seen.tobytes(), dtype=np.uint8), minlength=256)).pvalue > 1e-6


def test_a_client_reveals_one_or_the_other_secret_of_each_and_never_both(tmp_path):
    members = NAMES[:4]
    server = Coordinator(session_of(4), UNSIGNED, parties(tmp_path, members))
    server.advertise(members)
    server.share(members)
    server.mask(members[:3], dict.fromkeys(members, np.ones(5)))
    server.sign(members[:3])
    changed = server.mine(members[0]) | {members[1]: server.mine(members[0])[members[1]][:-1] + b"\0"}
    with pytest.raises(PrivacyError, match="did not arrive as it was sent"):
        server.who[members[0]].reveal("session", server.signatures, changed)
    told = server.who[members[1]].reveal("session", server.signatures, server.mine(members[1]))
    assert set(told) == set(members)
    for subject, purpose in ((members[0], "own mask"), (members[3], "mask")):
        secrets = sum_keys.Secrets(KEYS[subject], subject, server.session)
        secret = secrets.seed if purpose == "own mask" else secrets.mask.private_bytes_raw()
        assert told[subject] == shamir.split(secret, [2], 3, secrets.polynomial(purpose))[2]
    lost = secure.Party(
        members[2], KEYS[members[0]], UNSIGNED, secure.Identities(tmp_path, None), tmp_path / members[2], "run"
    )
    with pytest.raises(PrivacyError, match="lost in between"):
        lost.sign("session", server.sent)


def test_what_does_not_fit_together_is_refused(tmp_path):
    members = NAMES[:4]
    server = Coordinator(session_of(4), UNSIGNED, parties(tmp_path, members))
    with pytest.raises(PrivacyError, match="names a client twice"):
        secure.Session("s", ("a", "a", "b"), 2)
    server.advertise(members)
    server.share(members)
    server.mask(members[:3], dict.fromkeys(members, np.full(5, secure.STEP)))
    with pytest.raises(PrivacyError, match="asked for step 'sign' of a secure sum before 'mask'|is said not to have"):
        server.who[members[3]].sign("session", server.sent)
    server.sign(members[:3])
    server.reveal(members[:3])
    assert (server.open() == 3 * secure.STEP).all()
    revealed, shared = server.revealed, {c: server.adverts[c] for c in server.sealed}
    for subject, words in ((members[0], "open another mask"), (members[3], "open another key|do not fit together")):
        wrong = revealed | {members[1]: revealed[members[1]] | {subject: revealed[members[1]][subject] ^ 1}}
        with pytest.raises(PrivacyError, match=f"{words}|do not fit together"):
            secure.unmask(server.session, UNSIGNED, shared, server.masked, wrong)
    few = {c: {s: y for s, y in told.items() if s != members[0]} for c, told in revealed.items()}
    with pytest.raises(PrivacyError, match=f"0 clients that hold shares of client '{members[0]}'"):
        secure.unmask(server.session, UNSIGNED, shared, server.masked, few)
    with pytest.raises(PrivacyError, match="nobody sent"):
        secure.unmask(server.session, UNSIGNED, shared, {}, revealed)


def test_repeated_steps_give_the_same_bytes_and_sessions_differ(tmp_path):
    one, two = (play(tmp_path, 3, 50, name="a")[2] for _ in range(2))
    other = play(tmp_path, 3, 50, name="b")[2]
    assert all(np.array_equal(one[c], two[c]) and not np.array_equal(one[c], other[c]) for c in one)


# --- many clients ------------------------------------------------------------------------------------------------


@pytest.mark.slow  # `tests/jobs/test_bench.py` has another sum of 200 by default
def test_a_large_cohorts_sum_is_right_with_few_neighbours_and_a_third_gone(tmp_path):
    rule = secure.Rule(share=0.66)
    near = rule.neighbours(session_of(200, rule=rule))
    assert not near.complete and near.drawn <= 200 / 3 and rule.neighbours(session_of(50)).complete
    drops = [share_of(NAMES, 1 / 10, 0), share_of(NAMES, 1 / 10, 1), []]
    drops[2] = share_of([c for c in NAMES if c not in drops[0] + drops[1]], 1 / 6, 2)
    total, wanted, masked, values = play(tmp_path, 200, 20, drops, rule=rule)
    assert np.abs(total - wanted).max() <= 200 * secure.STEP / 2 + 1e-12 and len(masked) < 165
    assert np.array_equal(total, secure.decode(sum(secure.encode(values[c], 200) for c in masked)))


def test_neighbours_meet_their_bounds_as_scipy_counts_them():
    for members, colluding in ((200, 0.05), (500, 0.1), (1000, 0.2)):
        found = graph.neighbours(members, 2 * members // 3 + 1, colluding)
        assert not found.complete and found.group >= members / 10
        bad, gone = int(colluding * members), members // 3
        law, drops = (stats.hypergeom(members - 1, marked, found.drawn) for marked in (bad, gone))
        corrupt = next(c for c in range(found.drawn) if members * law.sf(c) < 2.0**-41)
        assert found.needed > corrupt + 1
        assert members * drops.sf(found.drawn - found.needed) <= 2.0**-30
        # A group of a tenth in which everybody has enough neighbours: log2 of how many there are, on average.
        size = members // 10 - 1
        inside = stats.hypergeom(members - 1, size - 1, found.drawn).logsf(found.needed - corrupt - 2) / np.log(2)
        choices = sum(np.log2((members - i) / (i + 1)) for i in range(size))
        assert choices + size * inside < -41
    for members in (3, 5, 50, 100):
        assert graph.neighbours(members, members // 2 + 1, 0.05) == graph.Neighbours(
            members - 1, members // 2 + 1, members // 2 + 1, True
        )


def test_who_a_client_draws_follows_from_its_own_key_alone():
    session = session_of(200)
    drawn = {c: sum_keys.Secrets(KEYS[c], c, session).draw(65) for c in NAMES}
    assert all(len(set(d)) == 65 and c not in d for c, d in drawn.items())
    other = sum_keys.Secrets(Key(bytes(32)), NAMES[0], session).draw(65)
    renamed = sum_keys.Secrets(KEYS[NAMES[0]], NAMES[0], replace(session, name="again")).draw(65)
    assert len({tuple(d) for d in (drawn[NAMES[0]], other, renamed)}) == 3
    counts = np.array([sum(c in d for d in drawn.values()) for c in NAMES])
    assert counts.mean() == 65 and counts.max() < 110  # nobody is everybody's neighbour


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=20), st.integers(3, 31))
def test_fixed_point(values, members):
    x = np.array(values)
    back = secure.decode(sum((secure.encode(x, members) for _ in range(members)), np.zeros(len(x), dtype=np.uint64)))
    assert np.abs(back - members * x).max() <= members * secure.STEP / 2 + 1e-9
    for wrong in (np.array([2.0**31 / members]), np.array([np.nan]), np.array([-np.inf])):
        with pytest.raises(PrivacyError, match="not below"):
            secure.encode(wrong, members)
