"""Noise of whole numbers: its distribution, and what a sum of shares is worth."""

import math

import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.privacy_loss_distribution import from_discrete_gaussian_mechanism
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

from fedray.privacy.accountant import Release, epsilon
from fedray.privacy.discrete import LEAST_SHARE, MOST_SHARE, effective_noise, integers, share_of
from fedray.privacy.keys import Key

KEY = Key(b"k" * 32)


def probabilities(deviation: float, most: int) -> np.ndarray:
    weights = np.exp(-(np.arange(-most, most + 1) ** 2) / (2 * deviation**2))
    return weights / weights.sum()


@pytest.mark.parametrize("deviation", [0.4, 1.0, 3.3, 10.0])
def test_draws_have_the_discrete_gaussians_frequencies(deviation):
    count, most = 200_000, math.ceil(3.5 * deviation)
    drawn = integers(KEY.stream("frequencies", str(deviation)), deviation, count)
    inside = drawn[np.abs(drawn) <= most]
    wanted = probabilities(deviation, 20 * most)[19 * most : -19 * most or None]
    observed = np.bincount(inside + most, minlength=2 * most + 1)
    wanted = wanted / wanted.sum() * len(inside)
    use = wanted > 5
    assert stats.chisquare(observed[use], wanted[use] * observed[use].sum() / wanted[use].sum()).pvalue > 1e-3


@pytest.mark.parametrize("deviation", [50.0, 1e4, 1e7])
def test_large_ones_are_normal_in_the_middle_and_in_the_tails(deviation):
    whole = integers(KEY.stream("large", str(deviation)), deviation, 300_000)
    drawn = (whole + np.random.default_rng(0).uniform(-0.5, 0.5, len(whole))) / deviation
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert abs(drawn.std() - 1) < 0.01 and 3.9 < np.abs(drawn).max() < 6.5


def test_the_same_stream_gives_the_same_numbers_and_how_many_are_asked_for_changes_none_of_the_first():
    one, other = (integers(KEY.stream("same"), 100.0, n) for n in (5000, 5000))
    assert (one == other).all() and integers(KEY.stream("other"), 100.0, 5000).tolist() != one.tolist()


@given(st.integers(1, 300), st.floats(0.3, 50.0), st.floats(1.0, 1e9))
@settings(max_examples=200, deadline=None)
def test_shares_add_up_to_the_noise_and_those_that_are_missing_are_counted(members, noise, sensitivity):
    deviation = noise * sensitivity
    if deviation / math.sqrt(members) < LEAST_SHARE:
        with pytest.raises(ValueError, match="too little for whole numbers"):
            share_of(deviation, members)
        return
    share = share_of(deviation, members)
    for sent in range(1, members + 1, max(1, members // 7)):
        assert math.isclose(effective_noise(noise, members, sent) * sensitivity, share * math.sqrt(sent), rel_tol=1e-9)
    assert effective_noise(noise, members, members + 5) == noise


def test_noise_that_fp64_draws_no_whole_numbers_of_is_refused():
    drawn = integers(KEY.stream("most"), MOST_SHARE, 20_000)
    assert 0.97 < drawn.std() / MOST_SHARE < 1.03 and abs(drawn).max() < 2**53
    assert 0.47 < (drawn & 1).mean() < 0.53  # the lowest bit is noise, too
    assert share_of(MOST_SHARE * 2, 4) == MOST_SHARE
    with pytest.raises(ValueError, match="more than fp64 draws whole numbers of.*lower privacy.clip"):
        share_of(MOST_SHARE * 2.01, 4)


@pytest.mark.parametrize(
    ("noise", "rounds", "delta"), [(1.0, 1, 1e-5), (4.0, 20, 1e-5), (8.0, 100, 1e-6), (2.0, 5, 1e-3)]
)
def test_epsilon_is_dp_accountings_or_above_it(noise, rounds, delta):
    """Of one number, where dp-accounting knows the discrete Gaussian itself, and of the Gaussian of many."""
    ours = epsilon([Release("training", noise, steps=rounds, discrete=True)], delta)
    sensitivity = 50
    discrete = from_discrete_gaussian_mechanism(noise * sensitivity, sensitivity=sensitivity).self_compose(rounds)
    accountant = PLDAccountant()
    accountant.compose(dp_event.GaussianDpEvent(noise), rounds)
    for theirs in (discrete.get_epsilon_for_delta(delta), accountant.get_epsilon(delta)):
        assert theirs * 0.98 <= ours <= theirs * 1.2


def test_a_sum_of_shares_is_no_less_private_than_its_rdp_says():
    """Renyi divergences of the sum of m discrete Gaussians from itself shifted by the sensitivity, by convolution."""
    for members, share, shift in ((2, 3.0, 4), (5, 2.0, 6), (3, 10.0, 25)):
        one = probabilities(share, 40 * math.ceil(share))
        total = one
        for _ in range(members - 1):
            total = np.convolve(total, one)
        for order in (2, 4, 16):
            p, q = total[shift:], total[:-shift]
            keep = (p > 1e-280) & (q > 1e-280)
            divergence = logsumexp(order * np.log(p[keep]) + (1 - order) * np.log(q[keep])) / (order - 1)
            tau = 10 * sum(math.exp(-2 * math.pi**2 * share**2 * k / (k + 1)) for k in range(1, members))
            assert divergence <= order * (shift / (math.sqrt(members) * share) + tau) ** 2 / 2 * (1 + 1e-9)
