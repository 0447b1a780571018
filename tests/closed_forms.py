"""What each method sends, as closed forms: the oracles that simulated traffic is held against.

r is a layer's rank, k the number of clients, and each form is (numbers up, numbers down, numbers down once) of one
client in a round (from 0), heads apart. With LoRA a factor B has r m numbers and a factor A r n.
"""

import math

from fedray.methods.increments import room


def closed_form(method, spec, cohort, client, round):
    """(up, down, once); FLoRIST's `down` is an upper bound."""
    return _FORMS[type(method).__name__](method, spec, cohort, client, round)


def first(spec, round, *rest):
    """Factors that rest and come from base weights: once, with the first round."""
    return spec.size(*rest) if rest and round == 0 else 0


def mean_of_factors(method, spec, cohort, client, round):
    """FedIT, FFA, Fed-SB, LoRA-FAIR, FedRPCA, FedRot, HetLoRA: what trains goes up and down, at the client's rank."""
    trains = method.trained(spec)
    size = spec.size(*trains, client=client)
    return size, size, first(spec, round, *(f for f in spec.adapter.started if f not in trains))


def ravan(method, spec, cohort, client, round):
    """h r^2 both ways: the products of cores and scales."""
    return spec.size("ravan_H"), spec.size("ravan_H"), 0


def fedsa(method, spec, cohort, client, round):
    """r n both ways: A; B stays."""
    size = spec.size(spec.adapter.pair[1])
    return size, size, first(spec, round, *spec.adapter.started)


def rolora(method, spec, cohort, client, round):
    """r m up in rounds 1, 3, ..., r n in rounds 2, 4, ...; down what was averaged in the round before."""
    B, A = (spec.size(f) for f in spec.adapter.pair)
    up, down = (B, A) if round % 2 == 0 else (A, B)
    return up, down if round else 0, first(spec, round, *spec.adapter.started)


def fedsvd(method, spec, cohort, client, round):
    """r m up, and from the second round on r (m + n) down."""
    B, A = spec.adapter.pair
    return spec.size(B), spec.size(B, A) if round else 0, first(spec, round, *spec.adapter.started)


def fedask(method, spec, cohort, client, round):
    """q (m + n) + 1 up and r (m + n) + q m down, with q columns in a sketch."""
    q = {layer.name: min(layer.rank + method.oversample, layer.m, layer.n) for layer in spec.layers}
    up = sum(q[layer.name] * (layer.m + layer.n) + 1 for layer in spec.layers)
    return up, spec.size() + sum(q[layer.name] * layer.m for layer in spec.layers), 0


def fedex(method, spec, cohort, client, round):
    """r (m + n) up; down the mean factors and a base update: (k - 1) r (m + n) for LoRA's covariance, sum r_i (m + n)
    where factors are fresh, and for a stacked adapter the clients' own factors and the mean's, with a coefficient
    each."""
    average = method.assignment == "average"
    stacked = spec.adapter.stacked and method.residual_rank is None
    wide = [_columns(method, spec, layer, cohort) for layer in spec.layers]
    numbers = [w * (layer.m + layer.n) for w, layer in zip(wide, spec.layers, strict=True)]
    usual = sum(numbers)
    if stacked:
        terms = 0 if average and len(cohort) == 1 else len(cohort) + average
        numbers = [terms * _factor_numbers(spec, layer) for layer in spec.layers]
        usual = sum(numbers) + terms * len(spec.layers)
    rests = spec.size(*spec.adapter.started) if spec.adapter.started and not average else 0
    down, again = _base_update(spec, numbers, wide, usual, round, rests)
    return spec.size(client=client), down + (spec.size() if average else 0), again + (0 if round else rests)


def _columns(method, spec, layer, cohort):
    """Columns of one round's base update of a layer."""
    k = len(cohort)
    each = [spec.adapter.delta_columns(spec.ranks.get(c, layer.rank)) for c in cohort]
    if method.assignment == "reinit":
        wide = sum(each)
    elif k == 1:
        wide = 0
    else:  # LoRA: a covariance; a stacked adapter: k deltas less that of the mean
        wide = (k + 1 if spec.adapter.stacked else k - 1) * each[0]
    return wide if method.residual_rank is None else min(method.residual_rank, wide, layer.m, layer.n)


def _factor_numbers(spec, layer):
    return sum(math.prod(shape) for shape in spec.adapter.shapes(layer).values())


def fedex_keep(method, spec, cohort, client, round):
    """r (m + n) up, k r (m + n) down: every client's own factors."""
    return spec.size(), len(cohort) * spec.size() if round else 0, 0


def fra(method, spec, cohort, client, round):
    """r (m + n) both ways; where the tail is folded, also its min(k r, m, n) - r columns, times r1 with ABBA."""
    adapter, pair = spec.adapter, spec.adapter.pair
    size, rests = spec.size(*pair, client=client), spec.size(*adapter.started) if adapter.started else 0
    if method.residual == "drop":
        return size, size, 0 if round else rests
    inner = [adapter.shapes(layer)[pair[1]][0] for layer in spec.layers]
    wide = [
        (min(len(cohort) * r, layer.m, layer.n) - r) * (adapter.delta_columns(layer.rank) // r)
        for r, layer in zip(inner, spec.layers, strict=True)
    ]
    numbers = [w * (layer.m + layer.n) for w, layer in zip(wide, spec.layers, strict=True)]
    down, again = _base_update(spec, numbers, wide, sum(numbers), round, rests)
    return size, size + down, again + (0 if round else rests)


def fra_ffa(method, spec, cohort, client, round):
    """FRA, then r m both ways, and the A that is frozen once."""
    B, A = spec.adapter.pair
    if round < method.fra_rounds:
        return fra(method, spec, cohort, client, round)
    return spec.size(B), spec.size(B), spec.size(A) if round == method.fra_rounds else 0


def _base_update(spec, numbers, columns, usual, round, rests):
    """(usual numbers, what a compressed increment has beyond them) of the base update that goes down in a round.

    Each round adds `numbers` and `columns` to a layer's. Where a layer's outgrow its room all layers are sent as a
    whole, in at most min(m, n) columns, with the `rests` numbers of factors at rest.
    """
    held, wide = [0] * len(numbers), [0] * len(numbers)
    sent, whole = 0, False
    for _ in range(round):
        held = [h + n for h, n in zip(held, numbers, strict=True)]
        wide = [w + c for w, c in zip(wide, columns, strict=True)]
        sent, whole = usual, any(h > room(layer) for h, layer in zip(held, spec.layers, strict=True))
        if whole:
            wide = [min(w, layer.m, layer.n) for w, layer in zip(wide, spec.layers, strict=True)]
            held = [w * (layer.m + layer.n) for w, layer in zip(wide, spec.layers, strict=True)]
            sent = sum(held) + rests
    return min(sent, usual), max(0, sent - usual)


_FORMS = {
    **dict.fromkeys(("FedIT", "FFA", "FedSB", "LoRAFair", "FedRPCA", "FedRot", "HetLoRA"), mean_of_factors),
    "RavanMean": ravan,
    "FedSA": fedsa,
    "RoLoRA": rolora,
    "FedSVD": fedsvd,
    "FedASK": fedask,
    **dict.fromkeys(("FedEx", "FLoRA"), fedex),
    "FedExKeep": fedex_keep,
    **dict.fromkeys(("FRA", "FlexLoRA", "RaFLoRA", "FLoRIST"), fra),
    "FRAFFA": fra_ffa,
}
