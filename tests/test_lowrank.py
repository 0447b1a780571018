"""LowRank against dense fp64 matrices, over random shapes, ranks and weights."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.lowrank import LowRank, squared_distances, total_norm

sizes = st.integers(1, 17)
seeds = st.integers(0, 2**31)


def draw(m, n, k, seed, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(m, k, generator=g, dtype=dtype), torch.randn(k, n, generator=g, dtype=dtype))


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(
        a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item() if b.numel() else 0)
    )


@settings(deadline=None, derandomize=True)
@given(sizes, sizes, st.integers(0, 9), st.integers(0, 9), seeds, st.floats(-3, 3))
def test_sums_products_and_inner_products_match_dense(m, n, j, k, seed, factor):
    M, N = draw(m, n, j, seed), draw(m, n, k, seed + 1)
    close((M + N).dense(), M.dense() + N.dense())
    close((M - N).dense(), M.dense() - N.dense())
    close((factor * M).dense(), factor * M.dense())
    assert M.inner(N) == pytest.approx((M.dense() * N.dense()).sum().item(), rel=1e-9, abs=1e-9)
    assert M.norm() == pytest.approx(M.dense().norm().item(), rel=1e-10)


@settings(deadline=None, derandomize=True)
@given(sizes, sizes, st.lists(st.tuples(st.integers(1, 4), st.floats(0, 2)), min_size=1, max_size=7), seeds)
def test_a_weighted_sum_matches_dense(m, n, terms, seed):
    matrices = [draw(m, n, k, seed + i) for i, (k, _) in enumerate(terms)]
    weights = [w for _, w in terms]
    close(LowRank.sum(matrices, weights).dense(), sum(w * M.dense() for M, w in zip(matrices, weights, strict=True)))


@settings(deadline=None, derandomize=True)
@given(sizes, sizes, st.lists(st.integers(0, 4), min_size=1, max_size=6), seeds)
def test_squared_distances_match_dense_and_a_huge_matrix_takes_nothing_from_the_others(m, n, columns, seed):
    matrices = [draw(m, n, k, seed + i, torch.float32) for i, k in enumerate(columns)]
    dense = [M.to(torch.float64).dense() for M in matrices]
    wanted = torch.tensor([[(a - b).square().sum().item() for b in dense] for a in dense], dtype=torch.float64)
    close(squared_distances(matrices), wanted)
    huge = LowRank(torch.full((m, 2), 1e20), torch.full((2, n), 1e20))
    close(squared_distances([*matrices, huge])[:-1, :-1], wanted)


@settings(deadline=None, derandomize=True)
@given(sizes, sizes, st.integers(1, 12), st.integers(1, 12), seeds)
def test_compress_is_the_best_approximation(m, n, k, rank, seed):
    M = draw(m, n, k, seed)
    U, S, Vt = torch.linalg.svd(M.dense(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    small = M.compress(rank)
    assert small.k <= rank
    assert (small.dense() - M.dense()).norm().item() == pytest.approx(
        (best - M.dense()).norm().item(), rel=1e-6, abs=1e-9
    )
    close(small.A @ small.A.T, torch.eye(small.k, dtype=torch.float64))


@settings(deadline=None, derandomize=True)
@given(sizes, sizes, st.integers(1, 40), seeds)
def test_bounded_and_a_tolerance_of_zero_lose_nothing(m, n, k, seed):
    M = draw(m, n, k, seed)
    assert M.bounded().k <= max(min(m, n), 0) or M.k <= min(m, n)
    close(M.bounded().dense(), M.dense(), 1e-9)
    close(M.compress().dense(), M.dense(), 1e-9)


def test_tolerance_drops_small_singular_values():
    M = draw(9, 11, 3, 0) + 1e-9 * draw(9, 11, 2, 1)
    assert M.compress(tolerance=1e-6).k == 3
    assert M.compress().k == 5


def test_norm_stays_accurate_where_terms_cancel():
    M, tiny = draw(30, 20, 4, 0), 1e-12 * draw(30, 20, 1, 1)
    assert ((M + tiny) - M).norm() == pytest.approx(tiny.norm(), rel=1e-2)  # a Gram form would see 0 or 1e-8


def test_dtype_and_shape_rules():
    M = draw(4, 3, 2, 0, torch.float32)
    assert M.compress(1).B.dtype == torch.float32 and M.to(torch.float64).A.dtype == torch.float64
    assert LowRank.zeros(4, 3).norm() == 0.0 and LowRank.zeros(4, 3).k == 0
    assert total_norm([LowRank.zeros(4, 3)]) == 0.0 and total_norm([M, M]) == pytest.approx(2**0.5 * M.norm())
    with pytest.raises(ValueError, match="do not form a product"):
        LowRank(torch.zeros(3, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="cannot add"):
        M + draw(3, 4, 2, 0, torch.float32)
    with pytest.raises(ValueError, match="no shape"):
        LowRank.sum([])


def spectrum(S, m, n, seed):
    """A matrix of these singular values, with as many columns."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(size, len(S), generator=g, dtype=torch.float64)).Q for size in (m, n))
    return LowRank(U * torch.as_tensor(S, dtype=torch.float64), V.T)


GAPS = {
    "clients that drift from one model": [*[1.0 - i / 20 for i in range(6)], *[0.01] * 194],
    "one that falls": [2.0**-i for i in range(200)],
    "a low rank": [1.0, 0.5, 0.25, *[0.0] * 197],
}


@pytest.mark.parametrize("S", GAPS.values(), ids=GAPS)
@pytest.mark.parametrize("shape", [(230, 260), (260, 210)])
def test_the_first_of_many_singular_values_are_those_of_the_whole(S, shape):
    rank, M = 6, spectrum(S, *shape, seed=1)
    assert M.krylov(rank) and not M.krylov(20)
    U, found, Vt = M.svd(rank)
    close(found, torch.tensor(S[:rank], dtype=torch.float64), 1e-10)
    close(U.T @ U, torch.eye(rank, dtype=torch.float64), 1e-12)
    close(Vt @ Vt.T, torch.eye(rank, dtype=torch.float64), 1e-12)
    left = torch.linalg.matrix_norm(M.dense() - (U * found) @ Vt).item()
    assert left == pytest.approx(sum(s * s for s in S[rank:]) ** 0.5, abs=1e-9, rel=1e-9)


def test_the_first_of_a_flat_spectrum_leave_hardly_more_than_the_best_would():
    M = draw(400, 420, 390, seed=2)
    rank, whole = 6, torch.linalg.svdvals(M.dense())
    U, S, Vt = M.svd(rank)
    left = torch.linalg.matrix_norm(M.dense() - (U * S) @ Vt).item()
    assert left / whole[rank:].square().sum().sqrt().item() - 1 < 1e-3
    assert left**2 == pytest.approx((M.norm() ** 2 - S.square().sum()).item(), rel=1e-9)


def test_many_columns_of_different_widths_are_put_together_where_they_stay():
    terms = [draw(30, 40, k, seed=k) for k in (1, 3, 2, 2)]
    weights = [0.5, -1.0, 2.0, 0.25]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        total = LowRank.total(iter(terms), weights, dtype)
        assert total.k == 8 and total.B.dtype == total.A.dtype == dtype and total.B.is_contiguous()
        close(total.dense().double(), LowRank.sum(terms, weights).dense(), tolerance)
    close(total.image(torch.eye(40, dtype=torch.float64)), total.dense().double(), 1e-6)
