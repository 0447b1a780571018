"""Who is who in a secure sum: Ed25519 keys (RFC 8032) that the parties exchange before the run.

A client's private key lies in the key folder of its own machine, drawn by `fedray identity --client NAME`; the public
keys of all clients stand in a file on each client's machine, a line a client as that command prints it. Without such
a file a client signs with a key that follows from its key of the run, and believes what the coordinator says of
others' keys: a coordinator that puts itself in between is not noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fedray.errors import ConfigError, PrivacyError
from fedray.privacy.files import hashed, make_secret
from fedray.privacy.keys import Key

SIGNATURE_BYTES, VERIFY_BYTES = 64, 32


class Signer:
    """A client's private key of signing."""

    def __init__(self, secret: bytes):
        self._private = Ed25519PrivateKey.from_private_bytes(secret)

    @property
    def public(self) -> bytes:
        """32 bytes that anyone may have."""
        return self._private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """64 bytes."""
        return self._private.sign(message)


def is_signed(public: bytes, signature: bytes, message: bytes) -> bool:
    """Whether whoever has the private key of `public` signed the message."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):  # the second: no public key
        return False
    return True


def signer_of_run(key: Key) -> Signer:
    """For a client without an identity."""
    return Signer(key.derive("secure sum", "signing"))


class Identities:
    """The identities that a machine knows: private keys below its key folder, and all clients' public keys in a file.
    `file` None: none were exchanged."""

    def __init__(self, keys: Path, file: str | None):
        self._folder, self._file = Path(keys) / "identities", file
        self._known: dict[str, bytes] | None = None

    @property
    def exchanged(self) -> bool:
        return self._file is not None

    def known(self) -> Mapping[str, bytes]:
        """Every client's public key. Raises PrivacyError for a file that is missing or malformed."""
        if self._known is None:
            assert self._file is not None, "identities are asked for where there are some"
            self._known = read_identities(Path(self._file).expanduser())
        return self._known

    def make(self, client: str) -> bytes:
        """The client's public key; its private key is drawn when there is none. Raises OSError when the folder cannot
        be written."""
        return Signer(make_secret(self._path(client))).public

    def signer(self, client: str, key: Key) -> Signer:
        """What the client signs with: its identity, or a key that follows from its key of the run.

        Raises PrivacyError where its identity is missing, is not the one that the others know, or is there in a run
        that does without: a client that has one takes part in no sum that anybody could stand in for it.
        """
        path = self._path(client)
        if not self.exchanged:
            if path.is_file():
                raise PrivacyError(
                    f"client '{client}' has an identity, and this run names no privacy.identities: it takes no part; "
                    f"give the file of all public keys, or remove {path}"
                )
            return signer_of_run(key)
        if not path.is_file():
            raise PrivacyError(
                f"client '{client}' has no identity on this machine: call `fedray identity --client {client}` there, "
                "and write what it prints into everyone's privacy.identities"
            )
        signer = Signer(path.read_bytes())
        if self.known().get(client) != signer.public:
            raise PrivacyError(
                f"privacy.identities has another key for client '{client}' than its own machine: call "
                f"`fedray identity --client {client}` there, and write what it prints into everyone's file"
            )
        return signer

    def check(self, members: tuple[str, ...]) -> None:
        """Raises PrivacyError for a client that nobody has met before."""
        if not self.exchanged:
            return
        if strangers := [c for c in members if c not in self.known()]:
            raise PrivacyError(f"client '{strangers[0]}' is not in privacy.identities: it may be the coordinator's own")
        if len({self.known()[c] for c in members}) < len(members):
            raise PrivacyError("two clients of privacy.identities have one key: each must draw its own")

    def _path(self, client: str) -> Path:
        return self._folder / hashed(client)


def line(client: str, public: bytes) -> str:
    """A client's line of the file."""
    return yaml.safe_dump({client: public.hex()}).strip()


def read_identities(file: Path) -> dict[str, bytes]:
    """Public keys by client. Raises PrivacyError for a file that is missing or malformed."""
    try:
        values = yaml.safe_load(file.read_text())
        keys = {str(client): bytes.fromhex(text) for client, text in values.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError, ValueError):
        raise PrivacyError(
            f"privacy.identities '{file}' cannot be read: it must hold a line `CLIENT: KEY` for each client, as "
            "`fedray identity` prints it"
        ) from None
    if wrong := [client for client, public in keys.items() if len(public) != VERIFY_BYTES]:
        raise PrivacyError(f"privacy.identities '{file}' has no key of {VERIFY_BYTES} bytes for client '{wrong[0]}'")
    return keys


def identity_command(client: str, keys: Path) -> str:
    """What `fedray identity` prints. Raises ConfigError where the key cannot be written."""
    try:
        return line(client, Identities(keys, None).make(client))
    except OSError as error:
        raise ConfigError(f"the identity of client '{client}' cannot be written to {keys}: {error.strerror}") from None
