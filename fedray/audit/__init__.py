"""`fedray audit`: a whole federated run with canaries, and the epsilon that they prove beside the one that is claimed.

Every canary is an example (with unit client: a client) that is put in or left out by a fair coin before the run, and
whose part in the sum is the most that the clip allows, in a number of its own: gradient canaries, the sharpest there
are (Nasr et al., USENIX Security 2023). Whoever the guarantee is against guesses the coins from what it sees of the
run, and many right guesses prove a larger epsilon (Steinke, Nasr, Jagielski, NeurIPS 2023; `privacy/audit.py`).
Everything else is the run itself: data, training, clipping, noise, sums, ledger.

A bound below the claim is no proof of privacy. One above it proves that the claim is false.
"""

from fedray.audit.audited import Finding, audit_run

__all__ = ["Finding", "audit_run"]
