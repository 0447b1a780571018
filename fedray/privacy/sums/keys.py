"""What follows from a client's key for one session, and what two clients agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedray.errors import PrivacyError
from fedray.privacy.keys import Key, Stream, words
from fedray.privacy.sums.identity import SIGNATURE_BYTES, VERIFY_BYTES, is_signed
from fedray.privacy.sums.rules import Session

#: What others get of an advert: two public keys and the signature.
PUBLIC_BYTES = 32 + 32 + SIGNATURE_BYTES
#: And what the coordinator gets beside it: the hash of the own mask's seed, and the key of the signature.
ADVERT_BYTES = PUBLIC_BYTES + 32 + VERIFY_BYTES


@dataclass(frozen=True)
class Advert:
    """A client's public keys: for pairwise masks (`mask`), for what others encrypt to it (`share`), and what it signs
    with (`verify`); `signature` binds the first two to the client and the session.

    For the coordinator alone: `seed`, the hash of the seed of its own mask, so that a wrong one is noticed, and
    `drawn`, whom it drew as neighbours, as bits (empty: all others).
    """

    mask: bytes
    share: bytes
    signature: bytes
    verify: bytes = b""
    seed: bytes = b""
    drawn: bytes = b""

    def public(self) -> Advert:
        """What other clients get of it."""
        return Advert(self.mask, self.share, self.signature)

    def message(self, client: str, digest: str) -> bytes:
        """What the signature is of. `digest`: of the session."""
        return words("fedray advert", digest, client, self.mask.hex(), self.share.hex())

    def check(self, client: str, digest: str, verify: bytes | None) -> None:
        """Raises PrivacyError unless that client made it for the session of that digest."""
        if verify is None or not is_signed(verify, self.signature, self.message(client, digest)):
            raise PrivacyError(
                f"the keys of client '{client}' for a secure sum are not signed by it: somebody else may have put "
                "theirs in their place"
            )


class Secrets:
    """A client's secrets of a session: the seed of its own mask, and its two private keys."""

    def __init__(self, key: Key, client: str, session: Session):
        self._key, self._client, self._session, self.digest = key, client, session, session.digest
        self.seed = self._derived("own mask")
        self.mask = X25519PrivateKey.from_private_bytes(self._derived("mask"))
        self.share = X25519PrivateKey.from_private_bytes(self._derived("share"))

    def _derived(self, purpose: str) -> bytes:
        return self._key.derive("secure sum", purpose, self._client, self.digest)

    def polynomial(self, purpose: str) -> Stream:
        """The coefficients of a secret's polynomial: one for a session, whoever is there."""
        return self._key.stream("secure sum", "polynomial", purpose, self._client, self.digest)

    def draw(self, count: int) -> list[str]:
        """So many of the other members, uniform, in the members' order."""
        others = [c for c in self._session.members if c != self._client]
        if count >= len(others):
            return others
        stream = self._key.stream("secure sum", "neighbours", self._client, self.digest)
        # Ties of 64-bit numbers are as good as impossible.
        order = np.argsort(stream.integers(len(others)), kind="stable")[:count]
        return [others[i] for i in sorted(order.tolist())]

    def cipher_key(self, theirs: Advert, sender: str, receiver: str) -> bytes:
        """Of the one message that `sender` encrypts to `receiver` in this session: what it says follows from the
        session and these two clients alone, so the key never encrypts two texts."""
        return agreed(self.share, theirs.share, self.digest, "share", sender, receiver)

    def pairwise(self, other: str, public: bytes, size: int) -> np.ndarray:
        """The mask (uint64) that the client adds for `other`: the negative of what `other` adds for it."""
        before = self._session.point(self._client) < self._session.point(other)
        return pairwise(self.mask, public, self.digest, before, size)


def agreed(private: X25519PrivateKey, public: bytes, digest: str, *purpose: str) -> bytes:
    """32 bytes that only the two owners of the keys know, for the session of that digest. Raises PrivacyError for a key
    that is none."""
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise PrivacyError("a client of a secure sum sent a public key that is none") from None
    mine = private.public_key().public_bytes_raw()
    keys = sorted((mine.hex(), public.hex()))
    return HKDF(hashes.SHA256(), 32, salt=None, info=words("secure sum", digest, *keys, *purpose)).derive(secret)


def pairwise(private: X25519PrivateKey, public: bytes, digest: str, before: bool, size: int) -> np.ndarray:
    """The mask that whose private key it is adds for the other. `before`: whether it comes before it in the session."""
    drawn = Stream(agreed(private, public, digest, "mask")).integers(size)
    return drawn if before else -drawn


def hash_of(seed: bytes) -> bytes:
    """What is said of a seed in advance."""
    return hashlib.sha256(seed).digest()


def bits(session: Session, clients: Iterable[str]) -> bytes:
    """Members of a session as bits, the first member first."""
    there = set(clients)
    return np.packbits([member in there for member in session.members]).tobytes()


def named(session: Session, which: bytes) -> list[str]:
    """The members that such bits mean, in the session's order. Raises PrivacyError for too few bits or too many."""
    flags = np.unpackbits(np.frombuffer(which, dtype=np.uint8))
    if len(flags) != 8 * bits_bytes(len(session.members)):
        raise PrivacyError("a list of the members of a secure sum does not fit its session")
    return [member for member, there in zip(session.members, flags, strict=False) if there]


def bits_bytes(members: int) -> int:
    """Bytes of a list of members as bits."""
    return (members + 7) // 8
