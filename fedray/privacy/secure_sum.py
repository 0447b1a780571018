"""Secure aggregation (Bonawitz et al., CCS 2017): the coordinator learns the sum of the clients' vectors and nothing
else about any of them.

Each pair of neighbours shares a mask that one adds and the other subtracts; each client adds one more of its own. What
hides a client that drops out (its key of pairwise masks) or one that stays (the seed of its own mask) is shared among
its neighbours, so that enough of them can take away the masks that would otherwise remain: one or the other of a client
and never both. Sums are in the integers modulo 2^64, so the masks cancel to the last bit.

| step      | a client sends                                             | needs                                 |
|-----------|------------------------------------------------------------|---------------------------------------|
| advertise | two X25519 public keys, signed; whom it drew as neighbours | the session                           |
| share     | for each it drew, encrypted, shares of its two secrets     | its neighbours' keys                  |
| mask      | its vector in fixed point, masked                          | who shared                            |
| sign      | its signature (Ed25519) of who shared and who sent         | who sent                              |
| reveal    | one share for each client whose shares it holds: of the    | signatures of the very same list, as  |
|           | seed of who sent a vector, of the key of who did not       | many as the threshold or more         |

Whom a client has for neighbours is in `sums/neighbours.py`, how many must stay and why in `sums/rules.py`, who signs
in `sums/identity.py`. A client's secrets follow from its own key and the session, and it writes down what it was told
and has answered before it answers (`sums/book.py`): a step that is repeated gives the same bytes, one with other inputs
is refused. Protects against a coordinator that lies in any way where identities were exchanged before the run; else
against one that passes on the clients' keys unchanged.
"""

from __future__ import annotations

from fedray.privacy.sums.fixed_point import FRACTION, STEP, decode, encode
from fedray.privacy.sums.identity import SIGNATURE_BYTES, VERIFY_BYTES, Identities
from fedray.privacy.sums.keys import ADVERT_BYTES, PUBLIC_BYTES, Advert, bits, bits_bytes, named
from fedray.privacy.sums.neighbours import neighbours
from fedray.privacy.sums.opening import edges, unmask
from fedray.privacy.sums.party import Party
from fedray.privacy.sums.rules import LEAST_MEMBERS, Rule, Session
from fedray.privacy.sums.shamir import SHARE_BYTES

#: Two shares and the tag of their encryption.
SEALED_BYTES = 2 * SHARE_BYTES + 16

__all__ = [
    "ADVERT_BYTES",
    "FRACTION",
    "LEAST_MEMBERS",
    "PUBLIC_BYTES",
    "SEALED_BYTES",
    "SHARE_BYTES",
    "SIGNATURE_BYTES",
    "STEP",
    "VERIFY_BYTES",
    "Advert",
    "Identities",
    "Party",
    "Rule",
    "Session",
    "bits",
    "bits_bytes",
    "decode",
    "edges",
    "encode",
    "named",
    "overhead",
    "unmask",
]


def overhead(members: int, rule: Rule) -> tuple[int, int]:
    """(up, down) bytes of one client beside its vector when nobody drops out; in a sparse graph on average, to the
    nearest byte. There only the signatures of who sent (and, without identities, what everyone signs with) grow with
    the cohort: 64 bytes for each of the threshold, 32 a member."""
    threshold = rule.threshold(members)
    near = neighbours(members, threshold, rule.colluding)
    several = members - 1 if near.complete else round(2 * near.drawn - near.drawn**2 / (members - 1))
    listed = bits_bytes(members)
    up = ADVERT_BYTES + near.drawn * SEALED_BYTES + SIGNATURE_BYTES + (near.drawn + 1) * SHARE_BYTES
    up += 0 if near.complete else listed
    down = several * PUBLIC_BYTES + 2 * listed + threshold * SIGNATURE_BYTES + near.drawn * SEALED_BYTES
    return up, down + (0 if rule.signed else members * VERIFY_BYTES)
