"""What clients would send that had not trained: what coded and late updates are measured from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fedray.federation.wire import Message, Packet, PacketView, decode, pack, unpack
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
            increments = {version: PacketView(packet) for version, packet in self._message.increments.items()}
            broadcast = decode(header, unpack(self._message.packet_of(client)), increments)
            view = self._method.view(self._spec, broadcast, client)
            self._packets[alike] = pack(unmoved(self._method, self._spec, client, view, self._heads, header.round))
        return self._packets[alike]
