"""raFLoRA: the SVD of the slices' own means, written out densely."""

import itertools

import torch
from algebra import effective, spec, train

from fedray.adapters import Layer
from fedray.methods.fra import FlexLoRA
from fedray.methods.raflora import RaFLoRA
from fedray.methods.state import key

LAYERS = (Layer("square", 40, 40, 4, 0.5), Layer("wide", 37, 53, 4, 2.0), Layer("tall", 61, 29, 4, 1.0))
RANKS = {"c0": 4, "c1": 1, "c2": 3, "c3": 2, "c4": 2}


def sliced(layer, updates, weights) -> torch.Tensor:
    """sum over slices [l, h) of the ranks of sum p_i / (p of all who have it) B_i[:, l:h] A_i[l:h], by a loop."""
    total, edges = torch.zeros(layer.m, layer.n, dtype=torch.float64), [0, *sorted(set(RANKS.values()))]
    for low, high in itertools.pairwise(edges):
        holders = [i for i, u in enumerate(updates) if RANKS[u.client] >= high]
        whole = sum(weights[i] for i in holders)
        for i in holders:
            B, A = (updates[i].tensors[key(layer, f)].double() for f in ("lora_B", "lora_A"))
            total += weights[i] / whole * B[:, low:high] @ A[low:high]
    return total


def test_it_is_the_svd_of_the_slices_means_and_each_client_gets_its_first_components():
    s, method = spec(layers=LAYERS, ranks=RANKS), RaFLoRA()
    state = method.init(s)
    updates = [train(method, state, c, i, torch.float64, 1.0 + i)[0] for i, c in enumerate(RANKS)]
    after, diagnostics = method.aggregate(state, iter(updates))
    flex, _ = FlexLoRA().aggregate(state, iter(updates))
    for layer in LAYERS:
        U, S, Vt = torch.linalg.svd(sliced(layer, updates, [(1.0 + i) / 15 for i in range(5)]))
        for client, rank in RANKS.items():
            want = layer.scale * (U[:, :rank] * S[:rank]) @ Vt[:rank]
            torch.testing.assert_close(effective(method, after, client)[layer.name], want, rtol=1e-9, atol=1e-9)
    assert diagnostics.exactness > 0.05  # it is not sum p_i delta_i, on purpose
    assert not torch.allclose(after.tensors["wide.lora_B"], flex.tensors["wide.lora_B"])


def test_with_equal_ranks_it_is_flexlora():
    s = spec(layers=LAYERS)
    state = RaFLoRA().init(s)
    updates = [train(RaFLoRA(), state, c, i, torch.float64, 1.0 + i)[0] for i, c in enumerate("abc")]
    mine, theirs = (m.aggregate(state, iter(updates))[0].tensors for m in (RaFLoRA(), FlexLoRA()))
    assert all(torch.allclose(mine[n], theirs[n], rtol=1e-12, atol=1e-12) for n in theirs)


def test_components_that_nobody_of_a_cohort_had_train_again():
    s, method = spec(layers=LAYERS, ranks=RANKS), RaFLoRA()
    state = method.init(s)
    state, _ = method.aggregate(state, iter([train(method, state, "c1", 0, torch.float64, 1.0)[0]]))
    assert state.tensors["wide.lora_A"].shape == (1, 53)
    for client, rank in (("c0", 4), ("c2", 3), (None, 4)):
        view = method.view(s, method.broadcast(state), client)
        rows, columns = view.tensors["wide.lora_A"], view.tensors["wide.lora_B"]
        assert [bool(row.any()) for row in rows] == [True] * rank + [False] * (4 - rank)
        assert columns[:, :1].any() and not columns[:, 1:].any()
    updates = [train(method, state, c, i, torch.float64, 1.0)[0] for i, c in enumerate(RANKS)]
    after, _ = method.aggregate(state, iter(updates))
    assert after.tensors["wide.lora_A"].shape == (4, 53)
