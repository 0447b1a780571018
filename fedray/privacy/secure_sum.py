"""Secure aggregation (Bonawitz et al., CCS 2017): the coordinator learns the sum of the clients' vectors and nothing
else about any of them.

Each pair of clients shares a mask that one adds and the other subtracts; each client adds one more of its own. What
hides a client that drops out (its key of pairwise masks) or one that stays (the seed of its own mask) is shared among
all, so that enough of them can take away the masks that would otherwise remain, in an honest session one or the other
of a client and never both. Sums are in the integers modulo 2^64, so the masks cancel to the last bit.

| step      | a client sends                                              | needs                   |
|-----------|-------------------------------------------------------------|-------------------------|
| advertise | two X25519 public keys, the hash of its own mask's seed     | -                       |
| share     | for each other client, encrypted, shares of its two secrets | the keys of all         |
| mask      | its vector in fixed point, masked                           | the keys of who shared  |
| reveal    | one share for each client: of the seed of who sent a vector, of the key of who did not | who did |

Against a coordinator that follows the protocol and looks at all it sees, together with fewer clients than the
threshold. A client's secrets follow from its own key and the session's name, so a client keeps no state between steps
and a step that is repeated gives the same bytes.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedray.errors import PrivacyError
from fedray.privacy.keys import Key, Stream, words

#: Bits after the point: a number is rounded to a multiple of 2^-32 before it is masked.
FRACTION = 32
STEP = 2.0**-FRACTION

#: Shares are points of polynomials over the integers modulo this Mersenne prime.
PRIME = 2**521 - 1
SHARE_BYTES = 66
ADVERT_BYTES = 96

#: With fewer members each would read the other out of the sum.
LEAST_MEMBERS = 3


@dataclass(frozen=True)
class Session:
    """One sum: a name that no other has, who takes part, in order, and how many must stay to the end."""

    name: str
    members: tuple[str, ...]
    threshold: int

    def __post_init__(self) -> None:
        if len(set(self.members)) < len(self.members):
            raise PrivacyError("a secure sum names a client twice")
        if len(self.members) < LEAST_MEMBERS or not 2 <= self.threshold <= len(self.members):
            raise PrivacyError(
                f"a secure sum needs {LEAST_MEMBERS} clients or more and a threshold between 2 and their "
                f"number, not {len(self.members)} and {self.threshold}"
            )


@dataclass(frozen=True)
class Advert:
    """A client's public keys: for pairwise masks, and for what others encrypt to it. `seed`: the hash of the seed of
    its own mask, so that a wrong seed is noticed."""

    mask: bytes
    share: bytes
    seed: bytes


def default_threshold(members: int) -> int:
    """More than half: two disjoint groups can then not both open a sum."""
    return members // 2 + 1


# --- fixed point ------------------------------------------------------------------------------------------------


def encode(values: np.ndarray, members: int) -> np.ndarray:
    """fp64 -> uint64, to the nearest multiple of STEP, negative numbers in two's complement. Raises PrivacyError for
    values whose sum over so many members could wrap around, or that are not finite."""
    limit = 2.0 ** (63 - FRACTION) / members
    if not np.isfinite(values).all() or (np.abs(values) >= limit).any():
        raise PrivacyError(
            f"a number to be summed securely is not below {limit:.3g} in size (times the client's weight): "
            "lower federation.lr, or use method.weights equal"
        )
    return np.rint(values * 2.0**FRACTION).astype(np.int64).view(np.uint64)


def decode(total: np.ndarray) -> np.ndarray:
    """uint64 -> fp64. Each member's number was off by STEP / 2 at most."""
    return total.view(np.int64).astype(np.float64) * STEP


# --- secrets that are shared -------------------------------------------------------------------------------------


def split(secret: bytes, count: int, threshold: int, stream: Stream) -> list[int]:
    """Shamir's shares (1979) at 1 ... count: any `threshold` of them give the secret, fewer nothing."""
    polynomial = [int.from_bytes(secret, "big")]
    # 640 bits each: as good as uniform below 2^521.
    polynomial.extend(int.from_bytes(stream.integers(10).tobytes(), "big") % PRIME for _ in range(threshold - 1))
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(polynomial):
            value = (value * x + coefficient) % PRIME
        shares.append(value)
    return shares


def join(shares: Mapping[int, int]) -> bytes:
    """The 32 bytes that shares by their points mean. Raises PrivacyError where they mean no 32 bytes."""
    secret = 0
    for x, y in shares.items():
        above = below = 1
        for other in shares:
            if other != x:
                above, below = above * -other % PRIME, below * (x - other) % PRIME
        secret = (secret + y * above * pow(below, -1, PRIME)) % PRIME
    if secret >= 1 << 256:
        raise PrivacyError("the shares of a secret do not fit together: too few, or changed on the way")
    return secret.to_bytes(32, "big")


# --- a client ----------------------------------------------------------------------------------------------------


def _private(key: Key, session: Session, purpose: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(key.derive("secure sum", purpose, session.name))


def _public(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def _agreed(private: X25519PrivateKey, public: bytes, session: Session, *purpose: str) -> bytes:
    secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), 32, salt=None, info=words("secure sum", session.name, *purpose)).derive(secret)


def _seed(key: Key, session: Session) -> bytes:
    return key.derive("secure sum", "own mask", session.name)


def advertise(key: Key, session: Session) -> Advert:
    """A client's first message."""
    return Advert(
        _public(_private(key, session, "mask")),
        _public(_private(key, session, "share")),
        hashlib.sha256(_seed(key, session)).digest(),
    )


def share(key: Key, client: str, session: Session, adverts: Mapping[str, Advert]) -> dict[str, bytes]:
    """A client's second message: for every client of `adverts`, itself included, two encrypted shares.

    Raises PrivacyError when fewer are there than the threshold, or its own advert is not what its key gives (the key
    was lost).
    """
    _check(key, client, session, adverts)
    order, mask = list(adverts), _private(key, session, "mask")
    parts = [
        split(
            secret, len(order), session.threshold, key.stream("secure sum", "polynomial", purpose, session.name, *order)
        )
        for purpose, secret in (("own mask", _seed(key, session)), ("mask", mask.private_bytes_raw()))
    ]
    private, sealed = _private(key, session, "share"), {}
    for i, other in enumerate(order):
        text = b"".join(part[i].to_bytes(SHARE_BYTES, "big") for part in parts)
        # Every pair and direction has a key of its own for one message, so the nonce may be constant.
        cipher = ChaCha20Poly1305(_agreed(private, adverts[other].share, session, "share", client, other))
        sealed[other] = cipher.encrypt(bytes(12), text, words(client, other))
    return sealed


def _check(key: Key, client: str, session: Session, adverts: Mapping[str, Advert]) -> None:
    if len(adverts) < session.threshold or not set(adverts) <= set(session.members):
        raise PrivacyError(f"{len(adverts)} clients of a secure sum are left, and {session.threshold} are needed")
    if adverts.get(client) != advertise(key, session):
        raise PrivacyError("its key of the secure sum was lost in between")


def mask(key: Key, client: str, session: Session, adverts: Mapping[str, Advert], vector: np.ndarray) -> np.ndarray:
    """A client's third message: its vector (uint64) masked against all others of `adverts`, those who shared."""
    _check(key, client, session, adverts)
    masked = vector + Stream(_seed(key, session)).integers(len(vector))
    private = _private(key, session, "mask")
    for other in adverts:
        if other != client:
            masked += _pairwise(private, client, other, adverts[other], session, len(vector))
    return masked


def _pairwise(
    private: X25519PrivateKey, client: str, other: str, advert: Advert, session: Session, size: int
) -> np.ndarray:
    """The mask that `client` adds for `other`: the negative of what `other` adds for it."""
    drawn = Stream(_agreed(private, advert.mask, session, "mask")).integers(size)
    order = session.members.index
    return drawn if order(client) < order(other) else -drawn


def reveal(
    key: Key,
    client: str,
    session: Session,
    adverts: Mapping[str, Advert],
    sealed: Mapping[str, bytes],
    sent: Sequence[str],
) -> dict[str, int]:
    """A client's fourth message: its share of the own mask of each client in `sent`, and of the pairwise key of each
    other that shared.

    `sealed`: what each client of `adverts` encrypted to it. Raises PrivacyError when fewer than the threshold have
    sent, or a message was changed on the way.
    """
    _check(key, client, session, adverts)
    if client not in sent:
        raise PrivacyError(
            f"client '{client}' is said not to have sent its part of a secure sum, but is asked to open it: "
            "nothing is revealed"
        )
    if len(set(sent) & set(adverts)) < session.threshold:
        raise PrivacyError(
            f"{len(set(sent) & set(adverts))} clients sent their part of a secure sum, and {session.threshold} "
            "are needed: nothing is revealed"
        )
    private, shares = _private(key, session, "share"), {}
    for other in adverts:
        cipher = ChaCha20Poly1305(_agreed(private, adverts[other].share, session, "share", other, client))
        try:
            text = cipher.decrypt(bytes(12), sealed[other], words(other, client))
        except (InvalidTag, KeyError):
            raise PrivacyError(f"the share of client '{other}' did not arrive as it was sent") from None
        shares[other] = int.from_bytes(text[:SHARE_BYTES] if other in sent else text[SHARE_BYTES:], "big")
    return shares


# --- the coordinator ---------------------------------------------------------------------------------------------


def unmask(
    session: Session,
    advertised: Sequence[str],
    adverts: Mapping[str, Advert],
    masked: Mapping[str, np.ndarray],
    revealed: Mapping[str, Mapping[str, int]],
) -> np.ndarray:
    """The sum (uint64) of the vectors of `masked`, from the shares of at least `threshold` clients. `advertised`: to
    whom shares were dealt, in order; `adverts`: of those who shared. Raises PrivacyError for too few, and for shares
    that do not open what was advertised."""
    if len(revealed) < session.threshold:
        raise PrivacyError(
            f"{len(revealed)} clients of a secure sum stayed to the end, and {session.threshold} are needed: "
            "the sum stays closed"
        )
    if not masked:
        raise PrivacyError("nobody sent a part of the secure sum")
    points = {client: i + 1 for i, client in enumerate(advertised)}
    who = list(revealed)[: session.threshold]

    def opened(subject: str) -> bytes:
        return join({points[c]: revealed[c][subject] for c in who})

    size = len(next(iter(masked.values())))
    total = np.zeros(size, dtype=np.uint64)
    for client in masked:
        total += masked[client]
        total -= Stream(_as_advertised(client, opened(client), adverts[client])).integers(size)
    for gone in (c for c in adverts if c not in masked):
        private = _key_as_advertised(gone, opened(gone), adverts[gone])
        for client in masked:  # take away what each added for the one that is gone
            total += _pairwise(private, gone, client, adverts[client], session, size)
    return total


def _as_advertised(client: str, seed: bytes, advert: Advert) -> bytes:
    """The seed of a client's own mask, held against the hash that it advertised."""
    if hashlib.sha256(seed).digest() != advert.seed:
        raise PrivacyError(
            f"the shares of client '{client}' open another mask than it advertised: the sum stays closed"
        )
    return seed


def _key_as_advertised(client: str, secret: bytes, advert: Advert) -> X25519PrivateKey:
    """A client's key of pairwise masks, held against the public key that it advertised."""
    private = X25519PrivateKey.from_private_bytes(secret)
    if _public(private) != advert.mask:
        raise PrivacyError(f"the shares of client '{client}' open another key than it advertised: the sum stays closed")
    return private


def overhead(members: int) -> tuple[int, int]:
    """(up, down) bytes of one client beside its vector when nobody drops out: keys, encrypted shares, shares."""
    sealed = 2 * SHARE_BYTES + 16
    return ADVERT_BYTES + members * (sealed + SHARE_BYTES), members * (ADVERT_BYTES + sealed)


def threshold_of(share_needed: float | None, members: int) -> int:
    """How many of so many members must stay: a share of them, or more than half; never fewer than LEAST_MEMBERS, but
    for three members, of whom one may drop out."""
    if share_needed is None:
        return default_threshold(members)
    return min(members, max(LEAST_MEMBERS if members > LEAST_MEMBERS else 2, math.ceil(share_needed * members)))
