"""A coordinator that lies: each thing it was once able to learn of a client, and what the client does now."""

import hashlib
import multiprocessing
import os
from dataclasses import replace

import numpy as np
import pytest
from secure_sums import KEYS, NAMES, UNSIGNED, Coordinator, parties, session_of

from fedray.errors import PrivacyError
from fedray.privacy import secure_sum as secure
from fedray.privacy.keys import Key
from fedray.privacy.sums import book, identity, keys

FIVE = NAMES[:5]
ONES = dict.fromkeys(NAMES, np.ones(4))
SIGNED = secure.Rule(signed=True)


def masked_by(folder, members=FIVE, rule=UNSIGNED, who=None, **more):
    """A coordinator to whom all members have sent their vectors."""
    server = Coordinator(session_of(len(members), rule=rule, **more), rule, who or parties(folder, members, rule))
    server.advertise(members)
    server.share(members)
    server.mask(members, ONES)
    return server


def identified(folder, members, rule=SIGNED):
    """Clients whose identities were exchanged, each with its own machine."""
    file = folder / "identities.yaml"
    made = [secure.Identities(folder / c / "keys", None).make(c) for c in members]
    file.write_text("".join(identity.line(c, public) + "\n" for c, public in zip(members, made, strict=True)))
    return {
        c: secure.Party(c, KEYS[c], rule, secure.Identities(folder / c / "keys", str(file)), folder / c, "run")
        for c in members
    }


def test_a_session_is_not_opened_twice_of_two_groups(tmp_path):
    """Threshold 3 of 5: two openings that share one client gave both secrets of everybody, and every vector."""
    server = masked_by(tmp_path)
    first, second = (secure.bits(server.session, some) for some in (FIVE[:3], FIVE[2:]))
    server.sent = first
    server.sign(FIVE[:3])
    with pytest.raises(PrivacyError, match="step 'sign' of the secure sum of w again with other inputs"):
        server.who[FIVE[2]].sign("session", second)
    server.reveal(FIVE[:3])
    with pytest.raises(PrivacyError, match="of w was opened of other clients before"):
        server.who[FIVE[2]].sign("session", second)
    server.sent = second
    signed = {c: server.who[c].sign("session", second) for c in FIVE[3:]}
    with pytest.raises(PrivacyError, match="2 clients signed the list of who sent, and 3 are needed"):
        server.who[FIVE[3]].reveal("session", signed, server.mine(FIVE[3]))
    # Nor do signatures of the other list count, nor some that nobody made.
    for wrong in (server.signatures[FIVE[2]], bytes(64), b""):
        with pytest.raises(PrivacyError, match="did not sign the list of who sent that client 'client 3' was shown"):
            server.who[FIVE[3]].reveal("session", signed | {FIVE[2]: wrong}, server.mine(FIVE[3]))


@pytest.mark.parametrize("rule", [UNSIGNED, SIGNED], ids=["no identities", "identities"])
def test_a_list_of_who_sent_that_differs_between_clients_opens_nothing(tmp_path, rule):
    who = identified(tmp_path, NAMES[:7]) if rule.signed else parties(tmp_path, NAMES[:7])
    server = masked_by(tmp_path, NAMES[:7], rule, who)
    one, other = (secure.bits(server.session, [c for c in NAMES[:7] if c != gone]) for gone in NAMES[:2])
    signatures = {c: who[c].sign("session", one) for c in NAMES[1:4]}
    signatures |= {c: who[c].sign("session", other) for c in [NAMES[0], *NAMES[4:7]]}
    for client in NAMES[:7]:
        with pytest.raises(PrivacyError, match="nothing is revealed"):
            who[client].reveal("session", signatures, server.mine(client))


def test_what_is_signed_covers_who_shared_and_what_was_given_to_whom(tmp_path):
    """A client that is told that others never shared masks against fewer; one that got another model sends what the
    coordinator likes (Pasquini et al., CCS 2022)."""
    server = Coordinator(session_of(5), UNSIGNED, parties(tmp_path, FIVE))
    server.advertise(FIVE)
    server.share(FIVE)
    everyone, fewer = server.shared, secure.bits(server.session, FIVE[:4])
    for client in FIVE[:4]:
        server.shared = fewer if client == FIVE[0] else everyone
        server.mask_one(client, np.ones(3), terms="another model" if client == FIVE[1] else "the model")
    server.sent = secure.bits(server.session, FIVE[:4])
    server.sign(FIVE[:4])
    for client in FIVE[:4]:
        with pytest.raises(PrivacyError, match="did not sign the list"):
            server.who[client].reveal("session", server.signatures, server.mine(client))


def test_the_name_of_a_session_is_used_once_and_masks_one_vector(tmp_path):
    """Two rounds under one name: the difference of the masked vectors was the difference of the updates, in clear."""
    server = masked_by(tmp_path)
    with pytest.raises(PrivacyError, match="used the name of a secure sum for another one"):
        server.who[FIVE[0]].advertise(session_of(5, what="other"))
    with pytest.raises(PrivacyError, match="step 'mask' .* again with other inputs"):
        server.mask_one(FIVE[0], np.zeros(4))
    assert np.array_equal(server.mask_one(FIVE[0], np.ones(4)), server.masked[FIVE[0]])  # the same again
    with pytest.raises(PrivacyError, match="ordered a secure sum of w for what is round 7"):
        server.who[FIVE[0]].mask("session", server.shared, 7, "round 7", np.ones(4, dtype=np.uint64))
    later = Coordinator(session_of(5, "later", round=2, what="round 2"), UNSIGNED, server.who)
    later.advertise(FIVE)
    with pytest.raises(PrivacyError, match="knows nothing of that secure sum"):
        server.mask_one(FIVE[0], np.zeros(4))
    with pytest.raises(PrivacyError, match="of round 1, and this client has been in round 2"):
        server.who[FIVE[0]].advertise(session_of(5, "again"))


def test_a_threshold_that_lets_two_groups_open_is_refused(tmp_path):
    for rule, low in ((UNSIGNED, 2), (SIGNED, 3), (secure.Rule(share=0.9), 4)):
        who = identified(tmp_path / str(low), FIVE, rule) if rule.signed else parties(tmp_path / str(low), FIVE, rule)
        for threshold in range(2, low + 1):
            session = secure.Session(f"s{threshold}", tuple(FIVE), threshold, "run", 1, "w")
            with pytest.raises(PrivacyError, match=f"that {threshold} of 5 clients open, and .* needs {low + 1}"):
                who[FIVE[0]].advertise(session)
        assert who[FIVE[0]].advertise(secure.Session("s", tuple(FIVE), low + 1, "run", 1, "w"))
    session = session_of(5)
    object.__setattr__(session, "members", tuple(FIVE[:2]))  # as a pickle may bring it
    with pytest.raises(PrivacyError, match="3 clients or more"):
        who[FIVE[0]].advertise(session)
    with pytest.raises(PrivacyError, match="that is not its own"):
        who[FIVE[0]].advertise(secure.Session("t", tuple(NAMES[1:6]), 5, "run", 1, "w"))


def test_the_theorem_of_the_threshold_holds_for_every_size():
    for members in range(3, 400):
        for rule, colluding in ((UNSIGNED, 0), (SIGNED, (members - 1) // 3)):
            assert 2 * rule.threshold(members) > members + colluding
            assert rule.threshold(members) <= members


def test_the_fewest_clients_of_a_sum_are_the_threshold_or_a_tenth_where_neighbours_are_few():
    assert [UNSIGNED.fewest(n) for n in (3, 50)] == [2, 26] and SIGNED.fewest(50) == 34
    assert UNSIGNED.fewest(200) == SIGNED.fewest(200) == 20


def test_shares_are_dealt_once_and_no_key_encrypts_two_texts(tmp_path):
    """With other adverts at the second call one key and nonce encrypted other shares: their difference was in clear."""
    who = parties(tmp_path, FIVE)
    server = Coordinator(session_of(5), UNSIGNED, who)
    server.advertise(FIVE)
    told, fewer = server.told(FIVE[0]), {c: server.told(FIVE[0])[c] for c in FIVE[1:4]}
    first = who[FIVE[0]].share("session", told, server.roster)
    assert who[FIVE[0]].share("session", told, server.roster) == first  # the same again
    with pytest.raises(PrivacyError, match="step 'share' .* again with other inputs"):
        who[FIVE[0]].share("session", fewer, server.roster)
    # A client that had lost its book would give the same texts under the same keys, or others under others.
    lost = parties(tmp_path / "lost", FIVE)
    again = Coordinator(session_of(5), UNSIGNED, lost)
    again.advertise(FIVE)
    second = lost[FIVE[0]].share("session", fewer, server.roster)
    assert all(second[c] == first[c] for c in fewer)
    own, theirs = (keys.Secrets(KEYS[c], c, server.session) for c in FIVE[:2])
    other = keys.Secrets(Key(bytes(32)), FIVE[1], server.session)
    ciphers = {
        own.cipher_key(server.adverts[FIVE[1]], FIVE[0], FIVE[1]),
        own.cipher_key(server.adverts[FIVE[1]], FIVE[1], FIVE[0]),
        own.cipher_key(replace(server.adverts[FIVE[1]], share=other.share.public_key().public_bytes_raw()), *FIVE[:2]),
    }
    assert len(ciphers) == 3
    assert theirs.cipher_key(server.adverts[FIVE[0]], FIVE[0], FIVE[1]) in ciphers


def test_a_forged_advert_is_refused(tmp_path):
    """Keys of the coordinator in the place of a client's: it reads what others encrypt to that client."""
    who = identified(tmp_path, FIVE)
    server = Coordinator(session_of(5, rule=SIGNED), SIGNED, who)
    server.advertise(FIVE)
    forged = keys.Secrets(Key(bytes(32)), FIVE[1], server.session)
    public = (forged.mask.public_key().public_bytes_raw(), forged.share.public_key().public_bytes_raw())
    real = server.told(FIVE[0])[FIVE[1]]
    own = identity.signer_of_run(Key(bytes(32)))
    by_itself = own.sign(secure.Advert(*public, b"").message(FIVE[1], server.session.digest))
    other = who[FIVE[1]].advertise(session_of(5, "other", rule=SIGNED))
    for wrong in (
        secure.Advert(*public, real.signature),
        secure.Advert(*public, by_itself, own.public),
        other.public(),  # of another session
        server.adverts[FIVE[2]].public(),  # another client's
    ):
        with pytest.raises(PrivacyError, match="keys of client 'client 1' for a secure sum are not signed by it"):
            who[FIVE[0]].share("session", server.told(FIVE[0]) | {FIVE[1]: wrong}, {FIVE[1]: own.public})
    assert who[FIVE[0]].share("session", server.told(FIVE[0]), {}).keys() == set(FIVE[1:])


def test_everything_of_a_session_is_signed():
    session = session_of(5)
    changed = [
        replace(session, name="x"),
        replace(session, members=tuple(reversed(FIVE))),
        replace(session, threshold=4),
        replace(session, run="x"),
        replace(session, round=2),
        replace(session, what="x"),
    ]
    assert len({s.digest for s in [session, *changed]}) == 7


def test_a_client_that_is_kept_apart_from_honest_ones_sends_nothing(tmp_path):
    who = parties(tmp_path, FIVE)
    server = Coordinator(session_of(5), UNSIGNED, who)
    server.advertise(FIVE)
    two = {FIVE[1]: server.told(FIVE[0])[FIVE[1]]}
    with pytest.raises(PrivacyError, match="2 clients of a secure sum are left, and 3 are needed"):
        who[FIVE[0]].share("session", two, server.roster)
    three = two | {FIVE[2]: server.told(FIVE[0])[FIVE[2]]}
    who[FIVE[0]].share("session", three, server.roster)
    with pytest.raises(PrivacyError, match="whose keys it kept back"):
        who[FIVE[0]].mask("session", secure.bits(server.session, FIVE), 1, "w", np.ones(3, dtype=np.uint64))


def test_a_sum_that_was_opened_is_not_opened_again_of_others_parts(tmp_path):
    """After a kill clients send the same again in a new session: two sums that differ in one client show it. The
    clients see to it themselves."""
    server = masked_by(tmp_path)
    server.sign(FIVE)
    server.reveal(FIVE)
    with pytest.raises(PrivacyError, match="of w was opened of other clients before"):
        again = masked_by(tmp_path, who=server.who, name="again")
        again.sent = secure.bits(again.session, FIVE[:4])
        again.sign(FIVE[:4])
    same = masked_by(tmp_path, who=server.who, name="same")
    same.sign(FIVE)
    same.reveal(FIVE)
    assert np.array_equal(same.open(), server.open())
    # Two sessions that are both signed: the first to be revealed counts.
    one = masked_by(tmp_path, who=server.who, name="one", round=2, what="round 2")
    two = masked_by(tmp_path, who=server.who, name="two", round=2, what="round 2")
    two.sent = secure.bits(two.session, FIVE[:4])
    one.sign(FIVE)
    two.sign(FIVE[:4])
    one.reveal(FIVE)
    with pytest.raises(PrivacyError, match="of round 2 was opened of other clients before"):
        two.reveal(FIVE[:4])


def test_a_session_is_not_begun_without_end(tmp_path):
    client = parties(tmp_path, FIVE)[FIVE[0]]
    for i in range(book.SESSIONS):
        client.advertise(session_of(5, str(i)))
    with pytest.raises(PrivacyError, match="of w was begun 16 times"):
        client.advertise(session_of(5, "one more"))
    client.advertise(session_of(5, "3"))  # known
    client.advertise(session_of(5, "next", round=2, what="round 2"))


def test_before_round_1_all_clients_are_in_the_sum_or_none(tmp_path):
    server = masked_by(tmp_path, round=0, what="RANGE")
    server.sent = secure.bits(server.session, FIVE[:4])
    with pytest.raises(PrivacyError, match="before round 1 needs all its clients"):
        server.sign(FIVE[:4])


def test_identities_that_are_missing_strange_or_ignored_are_refused(tmp_path):
    who = identified(tmp_path, FIVE)
    session, file = session_of(5, rule=SIGNED), tmp_path / "identities.yaml"

    def client(name, keys=None, file=str(file), rule=SIGNED):
        known = secure.Identities(keys or tmp_path / name / "keys", file)
        return secure.Party(name, KEYS[name], rule, known, tmp_path / "other", "run")

    with pytest.raises(PrivacyError, match="has no identity on this machine: call `fedray identity --client client 0`"):
        client(FIVE[0], tmp_path / "nowhere").advertise(session)
    secure.Identities(tmp_path / "new", None).make(FIVE[0])
    with pytest.raises(PrivacyError, match="another key for client 'client 0' than its own machine"):
        client(FIVE[0], tmp_path / "new").advertise(session)
    with pytest.raises(PrivacyError, match="'client 5' is not in privacy.identities"):
        who[FIVE[0]].advertise(session_of(6, rule=SIGNED))
    # A coordinator that leaves the file out of the config gets nothing from a client that has an identity.
    with pytest.raises(PrivacyError, match="has an identity, and this run names no privacy.identities"):
        client(FIVE[0], file=None, rule=UNSIGNED).advertise(session)
    for text, words in (("- a", "cannot be read"), ("a: zz", "cannot be read"), ("a: ab", "no key of 32 bytes")):
        (tmp_path / "wrong").write_text(text)
        with pytest.raises(PrivacyError, match=words):
            client(FIVE[0], file=str(tmp_path / "wrong")).advertise(session)
    twice = secure.Identities(tmp_path / FIVE[0] / "keys", None).make(FIVE[0])
    (tmp_path / "twice").write_text("".join(identity.line(c, twice) + "\n" for c in FIVE))
    with pytest.raises(PrivacyError, match="two clients of privacy.identities have one key"):
        client(FIVE[0], file=str(tmp_path / "twice")).advertise(session)


def answered_in_another_process(folder, name, queue):
    party = secure.Party(FIVE[0], KEYS[FIVE[0]], UNSIGNED, secure.Identities(folder, None), folder / FIVE[0], "run")
    try:
        party.advertise(session_of(5, what=name))
        queue.put("answered")
    except PrivacyError:
        queue.put("refused")


def test_what_was_answered_is_on_disk_for_its_owner_alone_and_for_every_process(tmp_path):
    masked_by(tmp_path)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert files and all(f.stat().st_mode & 0o077 == 0 for f in files)
    assert all(f.parent.stat().st_mode & 0o077 == 0 for f in files)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [
        context.Process(target=answered_in_another_process, args=(tmp_path / "two", f"w{i}", queue)) for i in range(4)
    ]
    for worker in workers:
        worker.start()
    told = sorted(queue.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    assert told == ["answered", "refused", "refused", "refused"]


def test_a_client_answers_only_when_what_it_answered_is_on_disk(tmp_path, monkeypatch):
    order, synced = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: order.append("disk") or synced(handle))
    monkeypatch.setattr(keys.Secrets, "__init__", counted(keys.Secrets.__init__, order))
    parties(tmp_path, FIVE)[FIVE[0]].advertise(session_of(5))
    assert order[0] == "disk" and "secret" in order
    order.clear()

    def fails(handle):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        parties(tmp_path, FIVE)[FIVE[1]].advertise(session_of(5))
    assert order == []


def counted(real, order):
    def made(self, *args):
        order.append("secret")
        real(self, *args)

    return made


def test_the_names_of_files_say_nothing(tmp_path):
    masked_by(tmp_path)
    name = hashlib.sha256(FIVE[0].encode()).hexdigest()[:32]
    assert (tmp_path / FIVE[0] / "secure-sums").is_dir()
    assert [f.name for f in (tmp_path / FIVE[0]).rglob(f"{name}*")] and not list((tmp_path / FIVE[0]).rglob("*client*"))
