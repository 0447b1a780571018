"""What crosses the wire: one contiguous fp32 vector and a manifest of names and shapes (`coding.py`: uploads in fewer
bytes).

One flat array is what Ray's object store moves fastest (README.md here). The bytes that are counted are the bytes
of these vectors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedray.errors import PrivacyError
from fedray.methods import Broadcast, Increment, Spec

Manifest = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Packet:
    """Named tensors as one fp32 vector; offsets follow from the manifest's sorted order."""

    manifest: Manifest
    vector: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.vector.nbytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names, the shapes and the numbers."""
        about = json.dumps([self.manifest, self.vector.dtype.str, self.vector.shape])
        digest = hashlib.sha256(about.encode())
        digest.update(np.ascontiguousarray(self.vector).data)
        return digest.hexdigest()

    def again(self) -> Packet:
        """The same in an object of one's own, in which nothing that somebody else worked out (a digest) comes along.
        Raises PrivacyError for what is no plain vector of fp32 numbers: of other types (a structure, read from another
        offset) two that differ may have one digest."""
        vector = self.vector
        if type(vector) is not np.ndarray or vector.ndim != 1 or vector.dtype != np.dtype(np.float32):
            raise PrivacyError("the coordinator sent what is no plain vector of fp32 numbers: it sends nothing")
        manifest = tuple((str(name), tuple(int(size) for size in shape)) for name, shape in self.manifest)
        return Packet(manifest, vector)

    def __reduce__(self) -> tuple[Any, ...]:
        # A digest never travels: whoever gets a packet works out its own.
        return Packet, (self.manifest, self.vector)


@dataclass(frozen=True)
class Opened(Packet):
    """An update that came in another form (`coding.py`), of `travelled` bytes."""

    travelled: int = 0

    @property
    def nbytes(self) -> int:
        return self.travelled

    def __reduce__(self) -> tuple[Any, ...]:
        return Opened, (self.manifest, self.vector, self.travelled)


def pack(tensors: Mapping[str, Tensor]) -> Packet:
    """Sorted by name, cast to fp32."""
    names = sorted(tensors)
    vector = np.empty(sum(tensors[n].numel() for n in names), dtype=np.float32)
    offset = 0
    for name in names:
        size = tensors[name].numel()
        vector[offset : offset + size] = tensors[name].detach().to("cpu", torch.float32).reshape(-1).numpy()
        offset += size
    return Packet(tuple((n, tuple(tensors[n].shape)) for n in names), vector)


def unpack(packet: Packet) -> dict[str, Tensor]:
    """Fresh tensors: arrays out of the object store are read-only, and aligned copies give the same bits everywhere.

    Raises ValueError when the vector is not as long as the manifest says.
    """
    size = sum(math.prod(shape) for _, shape in packet.manifest)
    if size != len(packet.vector):
        raise ValueError(f"a vector of {len(packet.vector)} numbers does not fit a manifest of {size}")
    return dict(PacketView(packet))


Unpack = Callable[[Packet], dict[str, Tensor]]


class UnpackOnce:
    """`unpack`, of packets with the same vector once: the tensors are shared, so they are only read."""

    def __init__(self) -> None:
        self._done: dict[tuple[int, Any], tuple[np.ndarray, dict[str, Tensor]]] = {}

    def __call__(self, packet: Packet) -> dict[str, Tensor]:
        """The packet's tensors. Raises ValueError as `unpack` does."""
        place = id(packet.vector), packet.manifest
        if place not in self._done:
            self._done[place] = packet.vector, unpack(packet)  # the vector is held: its id is nobody else's
        return dict(self._done[place][1])


class PacketView(Mapping[str, Tensor]):
    """A packet's tensors, each unpacked when it is asked for, anew every time: updates that lie in the object store
    are looked at there, and take no memory of this process but for the one tensor."""

    def __init__(self, packet: Packet):
        self._packet = packet

    @cached_property
    def _places(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        places, offset = {}, 0
        for name, shape in self._packet.manifest:
            places[name] = (offset, shape)
            offset += math.prod(shape)
        return places

    def __getitem__(self, name: str) -> Tensor:
        offset, shape = self._places[name]
        tensor = torch.empty(shape)
        tensor.view(-1).numpy()[:] = self._packet.vector[offset : offset + tensor.numel()]
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._packet.manifest)


@dataclass(frozen=True)
class Header:
    """The part of a broadcast that is no tensor. `increments`: (version, resets, digest) of those that are live.

    The digest is of the content: a round that is repeated after a coordinator's death may make another increment of the
    same version.
    """

    round: int
    trained: tuple[str, ...]
    draw: dict[str, int]
    plain: dict[str, Any]
    increments: tuple[tuple[int, bool, str], ...]

    @property
    def base_key(self) -> tuple:
        """Equal keys mean the same base weights, unless a method is personal."""
        return self.increments

    def to_text(self) -> str:
        """As JSON, of which `parse` makes the same header."""
        fields = [self.round, self.trained, self.draw, self.plain, self.increments]
        return json.dumps(fields, sort_keys=True, allow_nan=False)

    @classmethod
    def parse(cls, text: str) -> Header:
        """The header that `text` is of."""
        round, trained, draw, plain, increments = json.loads(text)
        return cls(round, tuple(trained), draw, plain, tuple((v, resets, digest) for v, resets, digest in increments))


def broadcast_digest(header: Header, packet: Packet) -> str:
    """SHA-256 of a broadcast to a client, the increments by their own digests: equal for a round that is repeated after
    a kill."""
    return hashlib.sha256(f"{header.to_text()}\n{packet.digest}".encode()).hexdigest()


def inputs_digest(header: Header, packet: Packet, kept: Packet | None) -> str:
    """SHA-256 of all that a client's round follows from beside its data and its orders: the broadcast, and what it
    kept. Worked out by the client, from packets of its own (`Packet.again`)."""
    return hashlib.sha256(f"{broadcast_digest(header, packet)}\n{kept and kept.digest}".encode()).hexdigest()


def as_announced(packet: Packet, digest: str) -> Packet:
    """The packet, as a client takes it. Raises PrivacyError where it is not the one of that digest."""
    own = packet.again()
    if own.digest != digest:
        raise PrivacyError("the coordinator sent another increment than it announced: it sends nothing")
    return own


@dataclass(frozen=True)
class Message:
    """A broadcast as it travels: a header, the packet of every round, and the increments, each put once.

    `cut`: by rank, the smaller packets of clients whose rank is not the largest; `ranks`: which clients those are.
    """

    header: Header
    packet: Packet
    increments: dict[int, Packet]
    cut: dict[int, Packet]
    ranks: dict[str, int]

    def packet_of(self, client: str) -> Packet:
        """What a client receives every round."""
        return self.cut[self.ranks[client]] if client in self.ranks else self.packet


def encode(broadcast: Broadcast, known: Mapping[int, Packet], spec: Spec) -> Message:
    """`known`: packets of increments made before, so that each is packed once."""
    packets = {i.version: known[i.version] if i.version in known else pack(i.tensors) for i in broadcast.increments}
    increments = tuple((i.version, i.resets, packets[i.version].digest) for i in broadcast.increments)
    header = Header(broadcast.round, broadcast.trained, broadcast.draw, broadcast.plain, increments)
    of_rank = {rank: client for client, rank in spec.ranks.items()}
    cut = {rank: pack(spec.cut(client, broadcast.tensors)) for rank, client in of_rank.items()}
    return Message(header, pack(broadcast.tensors), packets, cut, dict(spec.ranks))


def decode(header: Header, tensors: dict[str, Tensor], increments: Mapping[int, Mapping[str, Tensor]]) -> Broadcast:
    """`tensors`: of the packet, unpacked; `increments`: likewise by version, of which only the live are looked up."""
    live = tuple(Increment(version, increments[version], resets) for version, resets, _ in header.increments)
    return Broadcast(header.round, tensors, live, header.trained, header.draw, header.plain)
