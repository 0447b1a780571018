"""What tests of secure sums share: clients with keys, and a coordinator that follows the protocol."""

import hashlib

from fedray.privacy import secure_sum as secure
from fedray.privacy.keys import Key

NAMES = [f"client {i}" for i in range(200)]
KEYS = {name: Key(hashlib.sha256(name.encode()).digest()) for name in NAMES}
UNSIGNED = secure.Rule()


def session_of(count, name="session", rule=UNSIGNED, **more):
    return secure.Session(name, tuple(NAMES[:count]), rule.threshold(count), "run", **{"round": 1, "what": "w"} | more)


def parties(folder, members, rule=UNSIGNED, identities=None):
    return {
        c: secure.Party(c, KEYS[c], rule, secure.Identities(folder, identities), folder / c, "run") for c in members
    }


class Coordinator:
    """An honest one, a step at a time."""

    def __init__(self, session, rule, who):
        self.session, self.rule, self.who = session, rule, who

    def advertise(self, there):
        self.adverts = {c: self.who[c].advertise(self.session) for c in there}
        self.near = secure.edges(self.session, self.adverts)
        self.roster = {} if self.rule.signed else {c: a.verify for c, a in self.adverts.items()}

    def told(self, client):
        return {o: self.adverts[o].public() for o in self.near[client]}

    def share(self, there):
        self.sealed = {c: self.who[c].share(self.session.name, self.told(c), self.roster) for c in there}
        self.shared = secure.bits(self.session, self.sealed)

    def mask(self, there, values):
        self.masked = {c: self.mask_one(c, values[c]) for c in there}
        self.sent = secure.bits(self.session, self.masked)

    def mask_one(self, client, values, terms=""):
        vector = secure.encode(values, len(self.session.members))
        session = self.session
        return self.who[client].mask(session.name, self.shared, session.round, session.what, vector, terms)

    def sign(self, there):
        self.signatures = {c: self.who[c].sign(self.session.name, self.sent) for c in there}

    def mine(self, client):
        return {o: texts[client] for o, texts in self.sealed.items() if client in texts}

    def reveal(self, there):
        self.revealed = {c: self.who[c].reveal(self.session.name, self.signatures, self.mine(c)) for c in there}

    def open(self):
        shared = {c: self.adverts[c] for c in self.sealed}
        return secure.decode(secure.unmask(self.session, self.rule, shared, self.masked, self.revealed))
