"""A client's secret key and the random numbers that follow from it.

Noise that a client adds must be unknown to whoever sees its update, and the same when a round is repeated from the
same inputs. So it is a function of a key that never leaves the client's side and of the names of what it is for:
HMAC-SHA256 (RFC 2104) turns both into a key of the stream cipher ChaCha20 (RFC 8439), whose stream becomes uniform
and normal numbers.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from fedray.errors import PrivacyError
from fedray.privacy.files import hashed, make_secret

#: Replaces every key by one that follows from this word: for tests only, since whoever knows the word can take all
#: noise away again.
TEST_KEY = "FEDRAY_UNSAFE_TEST_KEY"

_BLOCK = 1 << 22  # numbers made at a time


def words(*parts: str | int) -> bytes:
    """The parts as bytes that no other parts give."""
    return b"".join(len(p).to_bytes(8, "big") + p for p in (f"{type(p).__name__}:{p}".encode() for p in parts))


def digest_of(*parts: str | int | bytes) -> str:
    """SHA-256 of the parts, in hexadecimals; no other parts give it."""
    plain = [part.hex() if isinstance(part, bytes) else part for part in parts]
    return hashlib.sha256(words(*plain)).hexdigest()


class Key:
    """32 secret bytes. `identity` may be shown to anyone: it tells keys apart and says nothing about them."""

    def __init__(self, secret: bytes, fixed: bool = False):
        if len(secret) != 32:
            raise ValueError(f"a key has 32 bytes, not {len(secret)}")
        self._secret, self.fixed = secret, fixed

    def __repr__(self) -> str:
        return f"Key({self.identity})"

    @property
    def identity(self) -> str:
        return self.derive("identity")[:8].hex()

    def derive(self, *parts: str | int) -> bytes:
        """32 bytes for one purpose."""
        return hmac.new(self._secret, words(*parts), hashlib.sha256).digest()

    def bound(self, what: bytes) -> Key:
        """The key for work on that data alone: the same noise must never be added to two data sets, whose difference
        would show."""
        return Key(self.derive("bound", hashlib.sha256(what).hexdigest()), self.fixed)

    def stream(self, *parts: str | int) -> Stream:
        """Random numbers for one purpose, the same ones for the same parts."""
        return Stream(self.derive("stream", *parts))


class Withheld(Key):
    """In the place of a key that is somewhere else."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def derive(self, *parts: str | int) -> bytes:
        """Raises PrivacyError: nothing may follow from no key."""
        raise PrivacyError("the client's key stays with its first rank: nothing is drawn here")


class Stream:
    """Numbers out of ChaCha20 under a key of its own."""

    def __init__(self, key: bytes):
        self._cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def integers(self, count: int) -> np.ndarray:
        """uint64, uniform over all values."""
        return np.frombuffer(self._cipher.update(bytes(8 * count)), dtype="<u8").astype(np.uint64, copy=False)

    def uniforms(self, count: int) -> Tensor:
        """fp64 in [0, 1), multiples of 2^-53."""
        return torch.from_numpy((self.integers(count) >> np.uint64(11)).astype(np.float64)).mul_(2.0**-53)

    def sample(self, count: int, rate: float) -> list[int]:
        """A Poisson sample of 0 ... count - 1: each by itself with probability `rate`, in order."""
        return torch.nonzero(self.uniforms(count) < rate).flatten().tolist() if count else []

    def normals(self, count: int) -> Tensor:
        """fp64 standard normals (Box and Muller, 1958), up to 8.5 standard deviations out."""
        made = torch.empty(count, dtype=torch.float64)
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            half = (size + 1) // 2
            radius = self.uniforms(half).neg_().add_(1.0).log_().mul_(-2.0).sqrt_()
            angle = self.uniforms(half).mul_(2.0 * torch.pi)
            made[start : start + half] = radius * angle.cos()
            made[start + half : start + size] = (radius * angle.sin())[: size - half]
        return made


def default_folder() -> Path:
    """`$XDG_STATE_HOME/fedray/keys`, or below `~/.local/state`."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "fedray" / "keys"


class KeyStore:
    """The keys of the clients that this machine serves, one file each: they outlive a worker, and are the client's,
    not the run's.

    A key is drawn from the operating system's randomness when it is first asked for. Where the file is gone another
    is drawn, and the ledger sees it by its `identity`.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = Path(folder) if folder is not None else default_folder()

    def key(self, run: str, client: str) -> Key:
        """The key of a client in a run (any two runs have different ones). Raises OSError when the folder cannot be
        written."""
        if word := os.environ.get(TEST_KEY):
            return Key(hashlib.sha256(words(word, client)).digest(), fixed=True)
        return Key(make_secret(self._path(run, client)))

    def forget(self, run: str, client: str) -> None:
        """Remove the key: from then on nobody can take the noise of the run away again."""
        path = self._path(run, client)
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()

    def forget_run(self, run: str) -> int:
        """Remove all keys of a run; how many there were."""
        files = list(self._path(run, "").parent.glob("*"))
        for path in files:
            path.unlink(missing_ok=True)
        if files:
            files[0].parent.rmdir()
        return len(files)

    def _path(self, run: str, client: str) -> Path:
        return self.folder / hashed(run) / hashed(client)
