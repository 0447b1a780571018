"""The coordinator's half of a secure sum: the total out of masked vectors and shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedray.errors import PrivacyError
from fedray.privacy.keys import Stream
from fedray.privacy.sums.keys import Advert, hash_of, named, pairwise
from fedray.privacy.sums.rules import Rule, Session
from fedray.privacy.sums.shamir import join


def edges(session: Session, adverts: Mapping[str, Advert]) -> dict[str, list[str]]:
    """By client, its neighbours among `adverts`: whom it drew, and who drew it; in the session's order."""
    drawn = {c: set(named(session, a.drawn)) if a.drawn else set(adverts) for c, a in adverts.items()}
    order = [c for c in session.members if c in adverts]
    return {c: [o for o in order if o != c and (o in drawn[c] or c in drawn[o])] for c in order}


def unmask(
    session: Session,
    rule: Rule,
    adverts: Mapping[str, Advert],
    masked: Mapping[str, np.ndarray],
    revealed: Mapping[str, Mapping[str, int]],
) -> np.ndarray:
    """The sum (uint64) of the vectors of `masked`. `adverts`: of those who shared; `revealed`: by who revealed, its
    shares by whose secret they are of. Raises PrivacyError for too few, and for shares that do not open what was
    advertised."""
    if len(revealed) < session.threshold:
        raise PrivacyError(
            f"{len(revealed)} clients of a secure sum stayed to the end, and {session.threshold} are needed: "
            "the sum stays closed"
        )
    if not masked:
        raise PrivacyError("nobody sent a part of the secure sum")
    needed, digest, near = rule.neighbours(session).needed, session.digest, edges(session, adverts)
    total = np.zeros(len(next(iter(masked.values()))), dtype=np.uint64)
    for client in masked:
        seed = _as_advertised(client, _opened(session, revealed, client, needed), adverts[client])
        total += masked[client]
        total -= Stream(seed).integers(len(total))
    for gone in adverts.keys() - masked.keys():
        private = _key_as_advertised(gone, _opened(session, revealed, gone, needed), adverts[gone])
        for client in masked.keys() & set(near[gone]):  # take away what each added for the one that is gone
            before = session.point(gone) < session.point(client)
            total += pairwise(private, adverts[client].mask, digest, before, len(total))
    return total


def _opened(session: Session, revealed: Mapping[str, Mapping[str, int]], subject: str, needed: int) -> bytes:
    """A client's secret, from the first shares of it."""
    shares = {session.point(c): told[subject] for c, told in revealed.items() if subject in told}
    if len(shares) < needed:
        raise PrivacyError(
            f"{len(shares)} clients that hold shares of client '{subject}' stayed to the end, and {needed} are "
            "needed: the sum stays closed"
        )
    return join(dict(list(shares.items())[:needed]))


def _as_advertised(client: str, seed: bytes, advert: Advert) -> bytes:
    """The seed of a client's own mask, held against the hash that it advertised."""
    if hash_of(seed) != advert.seed:
        raise PrivacyError(
            f"the shares of client '{client}' open another mask than it advertised: the sum stays closed"
        )
    return seed


def _key_as_advertised(client: str, secret: bytes, advert: Advert) -> X25519PrivateKey:
    """A client's key of pairwise masks, held against the public key that it advertised."""
    private = X25519PrivateKey.from_private_bytes(secret)
    if private.public_key().public_bytes_raw() != advert.mask:
        raise PrivacyError(f"the shares of client '{client}' open another key than it advertised: the sum stays closed")
    return private
