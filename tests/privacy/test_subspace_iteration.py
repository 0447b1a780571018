"""Why there is no client-level noise inside a subspace iteration (fedray/methods/README.md): noise in its last product
alone does not cover how far one client moves that product."""

import numpy as np

SIZE, CLIENTS, CLIP = 16, 20, 1.0


def last_product(total, start, iterations):
    """S V of `total` S, after so many iterations V <- orth(S' S V) without noise."""
    basis = start
    for _ in range(iterations):
        basis = np.linalg.qr(total.T @ (total @ basis))[0]
    return total @ basis


def furthest(iterations, moves_basis):
    """How far one client, clipped to CLIP, moves the last product: the most over starts that are public. `moves_basis`:
    whether the basis of the last product is worked out of the sum, or stands."""
    others = CLIENTS * CLIP / 4 * np.eye(SIZE)
    one = np.zeros((SIZE, SIZE))
    one[0, 0] = CLIP
    random = np.random.default_rng(0)
    moved = []
    for _ in range(100):
        start = np.linalg.qr(random.standard_normal((SIZE, 1)))[0]
        before = last_product(others, start, iterations)
        if moves_basis:
            after = last_product(others + one, start, iterations)
        else:  # as where each iterate is released with noise of its own
            basis = np.linalg.qr(before)[0]
            before, after = others @ basis, (others + one) @ basis
        moved.append(np.linalg.norm(after - before))
    return max(moved)


def test_noise_in_the_last_product_alone_does_not_cover_one_client():
    moved = [furthest(iterations, moves_basis=True) for iterations in (0, 1, 2, 5, 20)]
    assert moved[0] <= CLIP < moved[1] < moved[2] < moved[3] < moved[4]
    assert moved[4] > 5 * CLIP


def test_where_every_basis_was_released_with_noise_one_client_moves_no_more_than_the_clip():
    """||W V|| <= ||W|| for orthonormal V: each half-step is a Gaussian mechanism of sensitivity CLIP."""
    assert all(furthest(iterations, moves_basis=False) <= CLIP + 1e-12 for iterations in (1, 2, 5, 20))
