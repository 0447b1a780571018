"""Whatever a client sends, the round goes on without it or with what it means; whatever a coordinator sends, a client
answers or says in a sentence why not."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedray.federation.coordinator import Coordinator
from fedray.federation.messages import Answered, Failure, Outcome, Trained
from fedray.federation.pool_inline import InlinePool
from fedray.federation.prepare import prepare
from fedray.federation.wire import Packet
from fedray.federation.worker import Worker

ODD = "client-2"

#: Kinds of runs, and how many updates are tried of each: a thousand together.
KINDS = {
    "fedit": ({"method__name": "fedit"}, 250),
    "fedex": ({"method__name": "fedex"}, 200),
    "fed-sb": ({"method__name": "fed-sb", "adapter": {"kind": "lora-sb", "rank": 2}, "federation__lr": 0.1}, 150),
    "abba": ({"method__name": "fedit", "adapter": {"kind": "abba", "rank": 4, "alpha": 4}}, 150),
    "fedask": ({"method__name": "fedask"}, 100),
    "hetlora": (
        {
            "method__name": "hetlora",
            "adapter": {"rank": {"client-0": 2, "client-1": 2, ODD: 1}, "alpha": 4},
        },
        100,
    ),
    "unit client": ({"method__name": "ffa", "privacy": {"noise": 1.0, "unit": "client", "adaptive_clip": 0.5}}, 100),
}


class OddPool(InlinePool):
    """Gives back what clients sent in an honest round, but of one client what `odd` makes of it."""

    def __init__(self, worker):
        super().__init__(worker)
        self.odd, self._honest = None, {}

    def train(self, handle, round, clients, kept, deadline, orders):
        if "train" not in self._honest:
            self._honest["train"] = super().train(handle, round, clients, kept, deadline, orders)
        return [self._changed(o) for o in self._honest["train"] if o.client in clients]

    def ask(self, question, clients, kept, deadline):
        answers = super().ask(question, clients, kept, deadline)
        return [self._changed(o, self.odd_answer) for o in answers] if question.name == "ANSWER" else answers

    odd_answer = None

    def _changed(self, outcome, odd=None):
        odd = odd or self.odd
        return odd(outcome) if odd is not None and outcome.client == ODD else outcome


@pytest.fixture(scope="module")
def servers(make_config):
    """By kind: a coordinator before round 1, its pool, and the state that the round makes without the odd client."""
    made = {}

    def get(kind):
        if kind not in made:
            config = make_config(**KINDS[kind][0], federation__quorum=0.5, federation__evaluate_every=3)
            prepared = prepare(config)
            worker = Worker(config, "cpu", 1, prepared.data)
            pool = OddPool(worker)
            server = Coordinator(config, str(Path(config.output.dir)), worker.describe(), pool, prepared.data)
            server.evaluate_start()
            begun = server.state, list(server.records), server.channel.ledger.clip if config.privacy.on else None
            pool.odd = lambda outcome: Outcome(outcome.client, Failure(outcome.client, "it is gone", ""))
            server.run_round()
            made[kind] = server, pool, begun, server.state
        return made[kind]

    return get


def again(server, begun):
    state, records, clip = begun
    server.records, server.kept = list(records), {}
    server.publish(state)
    if clip is not None:
        server.channel.ledger.clip = clip


def sound(packet, report, honest: Outcome, clip: float | None) -> bool:
    """Whether it is what a client may send, worked out without the code that judges it."""
    want = honest.update
    if type(packet) is not Packet or type(packet.vector) is not np.ndarray or packet.manifest != want.manifest:
        return False
    if packet.vector.dtype != np.float32 or packet.vector.shape != want.vector.shape:
        return False
    numbers = packet.vector.astype(np.float64)
    if not np.isfinite(numbers).all() or np.sqrt((numbers**2).sum()) > 1e9:
        return False
    if type(report) is not type(honest.report) or report.nbytes != packet.vector.nbytes:
        return False
    if type(report.examples) is not int or not (report.examples > 0 or honest.report.examples == 0):
        return False
    if isinstance(report, Trained):
        said = [report.base_lost, report.seconds] + ([] if report.train_loss is None else [report.train_loss])
        if any(type(x) not in (int, float) or not abs(x) <= 1e30 for x in said) or report.examples >= 2**53:
            return False
    if clip is None:
        return report.examples >= 0
    bit, moved = numbers[0], numbers[1:]  # "(within the clip)" comes before all other names
    return abs(bit) == 0.5 and np.sqrt((moved**2).sum()) <= clip and report.examples >= 0


ODD_NUMBERS = st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 3e38, -3e38, 1e9, 0.0, 1e-45, 7.0])
HUGE = 10**5000  # more digits than Python writes out
SAID = st.sampled_from(
    [HUGE, 1e308, math.nan, math.inf, -math.inf, -50, 0, -1, True, None, "3", 3.0, 2**60, 2**53, 5, [], {}]
)
KINDS_OF_ODD = ["numbers", "length", "type", "names", "shapes", "object", "report", "scale", "failure"]


def failed(place, which):
    """A failure with words that are none, or another client's name."""
    words = [b"x", None, {1}, 3, "x" * 10**6, "it failed", HUGE, []]
    field = ["cause", "details", "key", "client"][place % 4]
    return Failure(**{"cause": "it failed", "details": "", "key": "", "client": "client-1"} | {field: words[which]})


@st.composite
def oddities(draw):  # noqa: C901 - a case each
    """A function: what a client sent -> what an odd one sends in its place."""
    kind = draw(
        st.sampled_from(["numbers", "length", "type", "names", "shapes", "object", "report", "scale", "failure"])
    )
    place, number, said = draw(st.integers(0, 10**6)), draw(ODD_NUMBERS), draw(SAID)
    which = draw(st.integers(0, 7))

    def change(packet, report):
        vector, manifest = packet.vector, packet.manifest
        i = place % max(1, len(manifest))
        name, shape = manifest[i] if manifest else ("", ())
        if kind == "numbers":
            vector = vector.copy()
            vector[place % len(vector) :][: which + 1] = number
        elif kind == "scale":
            with np.errstate(all="ignore"):
                vector = (vector.astype(np.float64) * number).astype(np.float32)
        elif kind == "length":
            vector = [vector[: place % len(vector)], np.concatenate([vector, vector[:1]]), vector[:0]][which % 3]
        elif kind == "type":
            vector = [
                *(vector.astype(t) for t in (np.float64, np.float16, np.int32, np.uint64, object)),
                vector.reshape(1, -1),
                vector.tolist(),
                None,
            ][which]
        elif kind == "names":
            entry = [(name + "x", shape), (name,), (7, shape), (name[:-1], shape), name, (None, None)][which % 6]
            manifest = [
                (*manifest[:i], entry, *manifest[i + 1 :]),
                (*manifest[:i], *manifest[i + 1 :]),
                (*manifest, manifest[i]),
                tuple(reversed(manifest)),
            ][place % 4]
        elif kind == "shapes":
            others = [shape[::-1], (-1, *shape), (math.prod(shape),), list(shape), ("a",), (HUGE,), (0, HUGE), None]
            other = others[which]
            manifest = (*manifest[:i], (name, other), *manifest[i + 1 :])
        elif kind == "object":
            return [None, {}, b"", vector, [packet], "packet", 3, (manifest, vector)][which], report
        elif kind == "failure":
            return None, failed(place, which)
        else:
            field = ["examples", "nbytes", "train_loss", "seconds", "base_lost", "client"][which % 6]
            if which == 7 or not hasattr(report, field):
                return packet, said
            report = dataclasses.replace(report, **{field: said})
        return Packet(manifest, vector), report

    return change


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value).*:RuntimeWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_a_client_sends_the_round_goes_on(servers, kind):
    server, pool, begun, without = servers(kind)
    clip = begun[2]
    met = {"left out": 0, "counted": 0}

    @settings(max_examples=KINDS[kind][1], deadline=None, database=None, derandomize=True)
    @given(oddities(), st.booleans())
    def holds(change, in_answer):
        again(server, begun)
        sent = []

        def odd(outcome):
            update, report = change(outcome.update, outcome.report)
            sent[:] = [(update, report, outcome)]
            return Outcome(outcome.client, report, update, outcome.kept)

        in_answer = in_answer and server.method.asks
        pool.odd, pool.odd_answer = (None, odd) if in_answer else (odd, None)
        record = server.run_round()
        assert server.state.round == 1 and all(torch.isfinite(t).all() for t in server.state.tensors.values())
        good = sound(*sent[0], clip)
        assert good == (not record["dropped"]), (sent[0][0].manifest, sent[0][2].update.manifest, record["dropped"])
        met["counted" if good else "left out"] += 1
        if not good:
            (out,) = record["dropped"]
            assert out["client"] == ("(withheld)" if clip is not None else ODD)
            assert out["reason"].strip() and "\n" not in out["reason"] and len(out["reason"]) < 2500
            if not server.method.asks:
                assert all(torch.equal(t, server.state.tensors[n]) for n, t in without.tensors.items())

    holds()
    assert min(met.values()) >= 3, met


ORDERS = ("rate", "noise", "clip", "expected", "weight", "run")
HEADER = ("round", "trained", "draw", "plain", "increments")
WRONG = st.one_of(st.floats(), st.none(), st.text(max_size=3), st.integers(-5, 5), st.booleans())


@pytest.mark.parametrize("private", [False, True])
def test_whatever_a_coordinator_orders_a_client_answers_in_a_sentence(make_config, private):
    config = make_config(method__name="ffa", privacy={"noise": 1.0} if private else {}, federation__local_steps=1)
    prepared = prepare(config)
    worker = Worker(config, "cpu", 1, prepared.data)
    calls = []

    class Recording(InlinePool):
        def train(self, handle, round, clients, kept, deadline, orders):
            calls.append((round, handle.header, handle.packet, handle.increments.__getitem__, None, orders[clients[0]]))
            return super().train(handle, round, clients, kept, deadline, orders)

    server = Coordinator(config, config.output.dir, worker.describe(), Recording(worker), prepared.data)
    server.evaluate_start()
    server.run_round()
    _, header, packet, fetch, kept, orders = calls[0]
    answers = {0: worker.train("client-0", *calls[0])[0].vector}

    @settings(max_examples=150, deadline=None, database=None, derandomize=True)
    @given(
        st.fixed_dictionaries({}, optional=dict.fromkeys(ORDERS, WRONG)),
        st.fixed_dictionaries({}, optional=dict.fromkeys(HEADER, WRONG)),
        st.sampled_from([0, 1, 7, -1, "0", None, 0.5]),
        oddities(),
        st.booleans(),
    )
    def holds(changed_orders, changed_header, number, change, other_packet):
        told = dataclasses.replace(orders, **changed_orders)
        head = dataclasses.replace(header, **changed_header)
        report = Trained("client-0", 1, 0.0, 0.0, 0.0, packet.nbytes)
        sent = change(packet, report)[0] if other_packet else packet
        update, _, report = worker.train("client-0", number, head, sent, fetch, kept, told)
        if update is None:
            assert isinstance(report, Failure) and report.cause.strip() and "\n" not in report.cause
            assert not private or not report.details
        else:
            # Whoever is answered a second time gets what it got before, bit for bit, where the answer has noise.
            assert isinstance(report, (Trained, Answered))
            assert not private or np.array_equal(update.vector, answers.setdefault(number, update.vector))

    holds()
