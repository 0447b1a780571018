"""What clients would send that had not trained: what coded and late updates are measured from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from torch import Tensor

from fedray.federation.wire import Message, Packet, decode, pack, unpack
from fedray.methods import Method, Spec, View
from fedray.methods.shapes import trained


def unmoved(
    method: Method, spec: Spec, client: str, view: View, heads: Sequence[str], round: int
) -> Mapping[str, Tensor]:
    """What a client would send that had not trained."""
    return method.upload(spec, client, trained(view, tuple(heads)), round)


class Starts:
    """The same at the coordinator, of the broadcast that was published last. `heads`: their names."""

    def __init__(self, method: Method, spec: Spec, heads: Sequence[str]):
        self._method, self._spec, self._heads = method, spec, tuple(heads)
        self._message: Message | None = None
        self._packets: dict[str, Packet] = {}

    def publish(self, message: Message) -> None:
        """Go on from this broadcast."""
        self._message = message
        self._packets.clear()

    def of(self, client: str) -> Packet:
        """Of a client; one for all of a rank, unless they have factors of their own."""
        alike = client if self._method.personal else str(self._spec.ranks.get(client, ""))
        if alike not in self._packets:
            assert self._message is not None, "an update follows a broadcast"
            header = self._message.header
            increments = {version: _Unread(packet) for version, packet in self._message.increments.items()}
            broadcast = decode(header, self._message.packet_of(client), increments)
            view = self._method.view(self._spec, broadcast, client)
            self._packets[alike] = pack(unmoved(self._method, self._spec, client, view, self._heads, header.round))
        return self._packets[alike]


class _Unread(Mapping[str, Tensor]):
    """A packet's tensors, unpacked when one is asked for: most are of the base, which nobody looks at here."""

    def __init__(self, packet: Packet):
        self._packet = packet

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return unpack(self._packet)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._packet.manifest)

    def __len__(self) -> int:
        return len(self._packet.manifest)
