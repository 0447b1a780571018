"""Every (adapter, method) pair of the table, and the variants of methods that have options: what the batteries run over."""

from fedray.methods import METHODS

#: id -> (adapter, method, options of the method section)
PAIRS = {f"{kind}+{name}": (kind, name, {}) for name, method in METHODS.items() for kind in method.adapters}
VARIANTS = {
    **{
        f"{kind}+{name}": (kind, method, options)
        for kind in ("lora", "abba")
        for name, (method, options) in {
            "fedex-reinit": ("fedex", {"assignment": "reinit"}),
            "fedex-truncated": ("fedex", {"residual_rank": 1}),
            "flora-truncated": ("flora", {"residual_rank": 2}),
            "fra-fold": ("fra", {"residual": "fold"}),
            "fra-balanced": ("fra", {"split": "balanced"}),
            "florist-half": ("florist", {"energy": 0.5}),
        }.items()
    },
    "lora+fedex-keep": ("lora", "fedex", {"assignment": "keep"}),
    "lora+fedask-wide": ("lora", "fedask", {"oversample": 25}),
}
ALL = PAIRS | VARIANTS

#: Exact in every round, within rounding. The rest states its error (`STATED`), an upper bound of it, or has no global model.
EXACT = {
    i
    for i, (_, method, options) in ALL.items()
    if method in ("ffa", "rolora", "fedsvd", "fed-sb", "ravan")
    or options.get("residual") == "fold"
    or (method in ("fedex", "flora") and "residual_rank" not in options)
}
BOUNDED = {i for i, (_, method, _) in ALL.items() if method == "fedask"}
PERSONAL = {i for i, (_, method, _) in ALL.items() if method == "fedsa"}
STATED = set(ALL) - EXACT - BOUNDED - PERSONAL
