"""A client's half of a secure sum. What the steps are: `fedray.privacy.secure_sum`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedray.errors import PrivacyError
from fedray.privacy.keys import Key, Stream, digest_of, words
from fedray.privacy.sums.book import Book, Page
from fedray.privacy.sums.identity import Identities, Signer, is_signed
from fedray.privacy.sums.keys import Advert, Secrets, bits, hash_of, named
from fedray.privacy.sums.rules import Rule, Session
from fedray.privacy.sums.shamir import SHARE_BYTES, split


class Party:
    """A client in the sums of one run: its key, its own config's rule, whom it knows, and its book. Every step raises
    PrivacyError where it is asked for what the rule, or an earlier answer, does not allow; nothing is told then."""

    def __init__(self, client: str, key: Key, rule: Rule, identities: Identities, folder: Path, run: str):
        self.client, self.key, self.rule, self.run = client, key, rule, run
        self.identities, self.book = identities, Book(folder, run, client)
        self._last: tuple[Session, Secrets] | None = None

    # --- the steps ---

    def advertise(self, session: Session) -> Advert:
        """Its public keys of a session, and whom it drew."""
        self.rule.check(session)
        if self.client not in session.members or session.run != self.run:
            raise PrivacyError(f"client '{self.client}' is asked to take part in a secure sum that is not its own")
        self.identities.check(session.members)
        signer = self._signer()
        with self.book.opened() as pages:
            pages.begin(session, self.key.identity)
        secrets, neighbours = self._secrets(session), self.rule.neighbours(session)
        advert = Advert(
            secrets.mask.public_key().public_bytes_raw(),
            secrets.share.public_key().public_bytes_raw(),
            b"",
            signer.public,
            hash_of(secrets.seed),
            b"" if neighbours.complete else bits(session, secrets.draw(neighbours.drawn)),
        )
        signature = signer.sign(advert.message(self.client, secrets.digest))
        return Advert(advert.mask, advert.share, signature, advert.verify, advert.seed, advert.drawn)

    def share(self, name: str, adverts: Mapping[str, Advert], roster: Mapping[str, bytes]) -> dict[str, bytes]:
        """For each other that it drew and that is there, encrypted, shares of its two secrets.

        `adverts`: of those it drew and those that drew it. `roster`: what every member that is there signs with, where
        no identities were exchanged.
        """
        with self.book.opened() as pages:
            page = pages.page(name, self.key.identity)
            session, others = page.session, {c: a for c, a in adverts.items() if c != self.client}
            self._check_adverts(session, others, roster)
            told = [part for c in sorted(others) for part in (c, others[c].mask, others[c].share, others[c].signature)]
            page.answer("share", None, *told, *(part for c in sorted(roster) for part in (c, roster[c])))
            page.adverts = {c: [a.mask.hex(), a.share.hex(), a.signature.hex()] for c, a in others.items()}
            page.roster = {c: public.hex() for c, public in roster.items()}
        return {
            other: self._cipher(session, others[other], self.client, other).encrypt(
                bytes(12), text, words(self.client, other)
            )
            for other, text in self._dealt(session, self._drawn(session, others)).items()
        }

    def _check_adverts(self, session: Session, others: Mapping[str, Advert], roster: Mapping[str, bytes]) -> None:
        if not set(others) <= set(session.members) or not set(roster) <= set(session.members):
            raise PrivacyError("the coordinator named clients that are no members of the secure sum")
        self._check_holders(session, others)
        if not self.identities.exchanged and roster.get(self.client) != self._signer().public:
            raise PrivacyError("the coordinator told others to believe another key than this client signs with")
        digest = session.digest
        for other, advert in others.items():
            advert.check(other, digest, self._verify(other, roster))

    def mask(self, name: str, shared: bytes, round: int, what: str, vector: np.ndarray, terms: str = "") -> np.ndarray:
        """Its vector (uint64) masked against its neighbours among those who `shared`. `round`, `what`: of the vector
        itself; `terms`: what it follows from beside the client's data, which must be the same for all."""
        with self.book.opened() as pages:
            page = pages.page(name, self.key.identity)
            session = page.session
            if (session.round, session.what) != (round, what):
                raise PrivacyError(
                    f"the coordinator ordered a secure sum of {session.what} for what is {what}: it sends nothing"
                )
            there = named(session, shared)
            self._check_there(page, there, "are left")
            page.answer("mask", "share", shared, terms, np.ascontiguousarray(vector).tobytes())
            page.shared, page.terms = there, terms
        secrets = self._secrets(session)
        masked = vector + Stream(secrets.seed).integers(len(vector))
        for other, advert in self._neighbours(page).items():
            masked += secrets.pairwise(other, advert.mask, len(vector))
        return masked

    def sign(self, name: str, sent: bytes) -> bytes:
        """Its signature of who sent a vector: of one list a session."""
        with self.book.opened() as pages:
            page = pages.page(name, self.key.identity)
            there = named(page.session, sent)
            self._check_sent(page, there)
            pages.check_opened(page.session.what, there)
            page.answer("sign", "mask", sent)
            page.sent = there
        return self._signer().sign(self._statement(page))

    def reveal(self, name: str, signatures: Mapping[str, bytes], sealed: Mapping[str, bytes]) -> dict[str, int]:
        """Its share of the own mask of each client on the list that it signed, and of the pairwise key of each other
        that shared; of those whose shares it holds. `signatures`: of who signed the same list, at least as many as the
        threshold. `sealed`: what each encrypted to it."""
        with self.book.opened() as pages:
            page = pages.page(name, self.key.identity)
            self._check_signatures(page, signatures)
            told = [part for c in sorted(sealed) for part in (c, sealed[c])]
            page.answer("reveal", "sign", *told)
            pages.opened[page.session.what] = pages.check_opened(page.session.what, page.sent)
        own = self._dealt(page.session, [self.client])[self.client]
        texts = {self.client: own} | {o: self._unsealed(page, o, text) for o, text in sealed.items()}
        return {
            other: int.from_bytes(text[:SHARE_BYTES] if other in page.sent else text[SHARE_BYTES:], "big")
            for other, text in texts.items()
        }

    # --- what is held against the rule ---

    def _check_holders(self, session: Session, there: Mapping[str, Advert] | Sequence[str]) -> None:
        """Enough of those it drew must be there: its secrets are shared among them and itself."""
        needed = self.rule.neighbours(session).needed
        if (left := 1 + len(self._drawn(session, there))) < needed:
            raise PrivacyError(f"{left} clients of a secure sum are left, and {needed} are needed")

    def _check_there(self, page: Page, there: Sequence[str], words: str) -> None:
        """A list of members that the client may go on with."""
        session = page.session
        if self.client not in there:
            raise PrivacyError(f"client '{self.client}' is said not to be there, but is asked to go on")
        if len(there) < session.threshold:
            raise PrivacyError(f"{len(there)} clients of a secure sum {words}, and {session.threshold} are needed")
        if not set(self._drawn(session, there)) <= set(page.adverts):
            raise PrivacyError("the coordinator named clients as there whose keys it kept back: nothing is sent")
        self._check_holders(session, there)

    def _check_sent(self, page: Page, sent: Sequence[str]) -> None:
        session = page.session
        if self.client not in sent:
            raise PrivacyError(
                f"client '{self.client}' is said not to have sent its part of a secure sum, but is asked to open it: "
                "nothing is revealed"
            )
        if len(sent) < session.threshold or not set(sent) <= set(page.shared):
            raise PrivacyError(
                f"{len(sent)} clients sent their part of a secure sum, and {session.threshold} of those that shared "
                "are needed: nothing is revealed"
            )
        if session.round == 0 and len(sent) < len(session.members):
            raise PrivacyError("a secure sum before round 1 needs all its clients: nothing is revealed")

    def _check_signatures(self, page: Page, signatures: Mapping[str, bytes]) -> None:
        statement = self._statement(page)
        roster = {c: bytes.fromhex(public) for c, public in page.roster.items()}
        for signer, signature in signatures.items():
            public = self._verify(signer, roster)
            if signer not in page.sent or public is None or not is_signed(public, signature, statement):
                raise PrivacyError(
                    f"client '{signer}' did not sign the list of who sent that client '{self.client}' was shown: "
                    "nothing is revealed"
                )
        if len(signatures) < page.session.threshold:
            raise PrivacyError(
                f"{len(signatures)} clients signed the list of who sent, and {page.session.threshold} are needed: "
                "nothing is revealed"
            )

    # --- what follows from what it knows ---

    def session(self, name: str) -> Session:
        """A session that it takes part in."""
        with self.book.opened() as pages:
            return pages.page(name, self.key.identity).session

    def _secrets(self, session: Session) -> Secrets:
        if self._last is None or self._last[0] != session:
            self._last = session, Secrets(self.key, self.client, session)
        return self._last[1]

    def _signer(self) -> Signer:
        return self.identities.signer(self.client, self.key)

    def _verify(self, client: str, roster: Mapping[str, bytes]) -> bytes | None:
        """What a client signs with, as far as this one knows."""
        return (self.identities.known() if self.identities.exchanged else roster).get(client)

    def _drawn(self, session: Session, there: Mapping[str, Advert] | Sequence[str]) -> list[str]:
        """Those of its neighbours by its own draw that are there."""
        here = set(there)
        return [c for c in self._secrets(session).draw(self.rule.neighbours(session).drawn) if c in here]

    def _neighbours(self, page: Page) -> dict[str, Advert]:
        """Everyone it masks against: whom it drew, and who drew it."""
        return {c: _advert(page, c) for c in page.adverts if c in page.shared}

    def _dealt(self, session: Session, holders: Sequence[str]) -> dict[str, bytes]:
        """The two shares of each holder, one after the other: of the own mask's seed, and of the pairwise key."""
        secrets, needed = self._secrets(session), self.rule.neighbours(session).needed
        points = {c: session.point(c) for c in holders}
        parts = [
            split(secret, points.values(), needed, secrets.polynomial(purpose))
            for purpose, secret in (("own mask", secrets.seed), ("mask", secrets.mask.private_bytes_raw()))
        ]
        return {c: b"".join(part[x].to_bytes(SHARE_BYTES, "big") for part in parts) for c, x in points.items()}

    def _cipher(self, session: Session, theirs: Advert, sender: str, receiver: str) -> ChaCha20Poly1305:
        # Every pair, direction and session has a key of its own for one message, so the nonce may be constant.
        return ChaCha20Poly1305(self._secrets(session).cipher_key(theirs, sender, receiver))

    def _unsealed(self, page: Page, other: str, text: bytes) -> bytes:
        try:
            if other not in page.shared:
                raise KeyError(other)
            cipher = self._cipher(page.session, _advert(page, other), other, self.client)
            return cipher.decrypt(bytes(12), text, words(other, self.client))
        except (InvalidTag, KeyError):
            raise PrivacyError(f"the share of client '{other}' did not arrive as it was sent") from None

    def _statement(self, page: Page) -> bytes:
        """What is signed of who sent: the same for all who were shown the same."""
        session = page.session
        roster = digest_of(*(part for c in sorted(page.roster) for part in (c, page.roster[c])))
        shared, sent = (bits(session, clients).hex() for clients in (page.shared, page.sent))
        return words("fedray sent", session.digest, roster, shared, sent, page.terms)


def _advert(page: Page, client: str) -> Advert:
    """What the client was told of another's keys. Raises KeyError for one that it knows nothing of."""
    mask, share, signature = page.adverts[client]
    return Advert(*(bytes.fromhex(part) for part in (mask, share, signature)))
