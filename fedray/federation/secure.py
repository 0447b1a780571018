"""The coordinator's side of secure aggregation: keys and shares before the clients work, shares after, and only the sum in between.

A client that drops out before it has shared is simply not in the sum; one that shared and sent nothing costs the others one share each; one
that sent is in the sum even if it is gone at the end.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedray.config.sections import Config
from fedray.errors import PrivacyError, RoundError
from fedray.federation.messages import Ask, Failure, Question, Report, Secure
from fedray.federation.wire import Packet
from fedray.privacy import secure_sum
from fedray.privacy.ledger import write_durably
from fedray.privacy.secure_sum import ADVERT_BYTES, SHARE_BYTES, Session


@dataclass
class Opened:
    """A sum whose clients have shared their secrets: what they are told (`secure`), what they dealt, and the bytes so far."""

    secure: Secure
    advertised: tuple[str, ...]
    sealed: dict[str, dict[str, bytes]]
    up: int
    down: int


class SecureSums:
    """`ask(question, clients)`: their outcomes, in order. `run`: under which clients file their keys. `folder`: of the checkpoints, where it
    is kept whose parts a sum was opened of."""

    def __init__(self, config: Config, ask: Callable[[Question, Sequence[str]], Sequence[Any]], run: str, folder: Path):
        self.config, self._ask, self.run, self._opened = config, ask, run, folder / "secure-sums.json"

    def open(self, clients: Sequence[str]) -> tuple[Opened, list[Failure]]:
        """Advertise and share. Returns who could not, too. Raises RoundError when fewer are left than the threshold."""
        threshold = secure_sum.threshold_of(self.config.privacy.secure_threshold, len(clients))
        session = Session(secrets.token_hex(16), tuple(clients), threshold)
        adverts, failures = self._answered(Ask.ADVERTISE, clients, Secure(self.run, session))
        dealt, late = self._answered(Ask.SHARE, list(adverts), Secure(self.run, session, adverts))
        failures += late
        if len(dealt) < threshold:
            raise RoundError(
                f"{len(dealt)} of {len(clients)} clients are there for a secure sum and {threshold} are needed: {'; '.join(f.cause for f in failures)}"
            )
        sharing = {c: adverts[c] for c in adverts if c in dealt}
        sent = sum(len(text) for texts in dealt.values() for text in texts.values())
        opened = Opened(
            Secure(self.run, session, sharing),
            tuple(adverts),
            dealt,
            ADVERT_BYTES * len(adverts) + sent,
            ADVERT_BYTES * len(adverts) * len(dealt),
        )
        return opened, failures

    def _remember(self, what: str, sent: Sequence[str]) -> None:
        """On disk before the sum is opened. Raises PrivacyError when, before a kill, it was opened of others' parts: clients send the same again,
        and two sums that differ by one client show it."""
        kept = json.loads(self._opened.read_text()) if self._opened.is_file() else {}
        before = kept.get(what, list(sent))
        if set(before) != set(sent):
            raise PrivacyError(
                f"the secure sum of {what} was opened of {', '.join(before)} before, and of {', '.join(sent)} it would show the difference: have the same clients back"
            )
        # Of rounds only the last can be repeated.
        kept = {w: c for w, c in kept.items() if not (w.startswith("round ") and what.startswith("round "))}
        write_durably(self._opened, json.dumps(kept | {what: list(sent)}))

    def close(self, opened: Opened, packets: Mapping[str, Packet], what: str) -> dict[str, Tensor]:
        """The sum (fp64) of what the clients of `packets` masked; `what` it is the sum of, the same after a resume. Raises PrivacyError when too
        few stay to open it, or it was opened of others' parts before."""
        sent = tuple(packets)
        self._remember(what, sent)
        mine = {c: {o: opened.sealed[o][c] for o in opened.secure.adverts} for c in sent}
        told, refused = self._answered(
            Ask.REVEAL, sent, Secure(self.run, opened.secure.session, opened.secure.adverts, mine, sent)
        )
        opened.down += sum(len(text) for texts in mine.values() for text in texts.values())
        opened.up += SHARE_BYTES * sum(len(shares) for shares in told.values())
        if len(told) < opened.secure.session.threshold:
            raise PrivacyError(
                f"{len(told)} clients of a secure sum stayed to the end, and {opened.secure.session.threshold} are needed: the sum stays closed"
                + (f" ({refused[0].client}: {refused[0].cause})" if refused else "")
            )
        vectors = {c: packet.vector for c, packet in packets.items()}
        total = secure_sum.unmask(opened.secure.session, opened.advertised, opened.secure.adverts, vectors, told)
        return unflatten(next(iter(packets.values())).manifest, secure_sum.decode(total))

    def _answered(self, ask: Ask, clients: Sequence[str], secure: Secure) -> tuple[dict[str, Any], list[Failure]]:
        outcomes = self._ask(Question(ask, secure=secure), clients)
        done = {o.client: o.report.sealed for o in outcomes if isinstance(o.report, Report)}
        return done, [o.report for o in outcomes if isinstance(o.report, Failure)]


def masked(key, client: str, tensors: Mapping[str, Tensor], secure: Secure, weight: float) -> Packet:
    """A client's tensors times its weight, in fixed point and masked, 8 bytes a number."""
    names = sorted(tensors)
    values = torch.cat([tensors[n].detach().double().reshape(-1) for n in names]).cpu().numpy() * weight
    vector = secure_sum.encode(values, len(secure.session.members))
    manifest = tuple((n, tuple(tensors[n].shape)) for n in names)
    return Packet(manifest, secure_sum.mask(key, client, secure.session, secure.adverts, vector))


def unflatten(manifest, values: np.ndarray) -> dict[str, Tensor]:
    """fp64 tensors of the manifest's names and shapes."""
    tensors, offset = {}, 0
    for name, shape in manifest:
        size = math.prod(shape)
        tensors[name] = torch.from_numpy(values[offset : offset + size].copy()).reshape(shape)
        offset += size
    return tensors
