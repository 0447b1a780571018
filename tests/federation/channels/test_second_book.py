"""A coordinator that has a round's sum opened a second time, of other clients, under another run's name: each run has a
book of its own of what clients have opened, so a client is in one run only."""

import dataclasses

import pytest
from support import run

from fedray.errors import PrivacyError, RoundError
from fedray.federation.channels.orders import OneRun
from fedray.federation.channels.secure import SecureSums
from fedray.federation.messages import Orders
from fedray.federation.pool_inline import InlinePool
from fedray.federation.worker import Worker

PLAIN = {"secure_aggregation": True}
NOBODY = PLAIN | {"unit": "client", "trust": "nobody", "noise": 2.0, "delta": 0.01, "clip": 0.5}


@pytest.mark.parametrize("privacy", [PLAIN, NOBODY], ids=["sums", "nobody"])
def test_a_client_is_in_the_sums_of_one_run_only(make_config, monkeypatch, privacy):
    real, tried = SecureSums.collect, []

    def collect(self, agreed, round, *args, **kwargs):
        intake = real(self, agreed, round, *args, **kwargs)
        ghost = SecureSums.__new__(SecureSums)
        ghost.__dict__.update(self.__dict__)
        ghost.run = "another"
        with pytest.raises(RoundError, match="named another run than the one this worker is for: it sends nothing"):
            ghost._agree(list(agreed.session.members), round)
        tried.append(round)
        return intake

    monkeypatch.setattr(SecureSums, "collect", collect)
    run(make_config(method__name="ffa", privacy=privacy, federation__clients=4))
    assert tried == [0, 1, 2]


@pytest.mark.parametrize("name", ["", None, 0])
def test_a_run_without_a_name_is_none(name):
    one = OneRun()
    with pytest.raises(PrivacyError, match="named no run: it sends nothing"):
        one.check(name)
    one.check("first")
    with pytest.raises(PrivacyError, match="another run than the one"):
        one.check("second")


def test_what_is_noised_and_what_is_masked_are_of_one_run(make_config):
    """A worker that has masked in one run noises in no other, and the other way round."""
    worker = Worker(make_config(method__name="ffa", privacy=NOBODY, federation__clients=4), "cpu", 1)
    worker.side.sealer.party("client-0", "first")
    with pytest.raises(PrivacyError, match="another run than the one"):
        worker.side.key("client-0", Orders("second"))


@pytest.mark.parametrize("privacy", [PLAIN, NOBODY], ids=["sums", "nobody"])
def test_orders_of_another_run_than_the_sums_get_nothing(make_config, monkeypatch, privacy):
    real, refused = InlinePool.train, []

    def train(self, handle, round, clients, kept, deadline, orders):
        other = {c: dataclasses.replace(o, run=f"{o.run}-again") for c, o in orders.items()}
        for outcome in real(self, handle, round, clients, kept, deadline, other):
            assert outcome.failed and outcome.report.cause.endswith("it sends nothing"), outcome.report
            refused.append(outcome.client)
        return real(self, handle, round, clients, kept, deadline, orders)

    monkeypatch.setattr(InlinePool, "train", train)
    run(make_config(method__name="ffa", privacy=privacy, federation__clients=4))
    assert len(refused) == 3 * 4
