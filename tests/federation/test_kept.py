"""What stays with a client is judged like what it sends: it is in the checkpoint, and nobody else's round may end for
it."""

import numpy as np
import pytest
import torch
from support import final_tensors, rounds, run

from fedray.federation.wire import Packet
from fedray.federation.worker import Worker


def more(kept, name, shape):
    return Packet((*kept.manifest, (name, shape)), np.append(kept.vector, np.ones(int(np.prod(shape)), np.float32)))


ODD = {
    "text": lambda kept: "a packet",
    "none": lambda kept: None,
    "a vector too short": lambda kept: Packet(kept.manifest, kept.vector[:-1]),
    "not finite": lambda kept: Packet(kept.manifest, np.full_like(kept.vector, np.nan)),
    "other names": lambda kept: Packet((("own/x", (len(kept.vector),)),), kept.vector),
    "a huge shape": lambda kept: Packet((("own/x", (0, 10**30)),), kept.vector[:0]),
    "a shape that overflows": lambda kept: Packet((*kept.manifest, ("optimizer/x", (2**53, 2**53, 0))), kept.vector),
    "a name that nobody writes": lambda kept: more(kept, "optimizer/\ud800", (1,)),
    "a state of nothing": lambda kept: more(kept, "optimizer/x.lora_B/exp_avg", (2, 2)),
    "many tensors": lambda kept: Packet((*kept.manifest, *((f"t{i}", (0,)) for i in range(9999))), kept.vector),
    "a masked array": lambda kept: Packet(kept.manifest, np.ma.masked_array(kept.vector)),
}
RUNS = {
    "fedsa": {"method__name": "fedsa"},
    "optimizer": {"method__name": "fedit", "federation__keep_optimizer": True},
}


def played(make_config, monkeypatch, change, **overrides):
    """The run's rounds, in which client 2 answers what `change` makes of its update and what it keeps."""
    real = Worker.train

    def train(self, client, *args):
        update, kept, report = real(self, client, *args)
        if client == "client-2" and update is not None:
            update, kept = change(update, kept)
        return update, kept, report

    monkeypatch.setattr(Worker, "train", train)
    folder = run(make_config(federation__quorum=0.5, **overrides))
    assert all(torch.isfinite(t).all() for t in final_tensors(folder).values())
    return rounds(folder)[1:]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("which", RUNS)
def test_a_client_whose_own_tensors_are_none_is_left_out(make_config, monkeypatch, which, odd):
    if which == "optimizer" and odd == "none":
        pytest.skip("plain SGD keeps nothing")
    records = played(make_config, monkeypatch, lambda update, kept: (update, ODD[odd](kept)), **RUNS[which])
    for record in records:
        (left,) = record["dropped"]
        assert left["client"] == "client-2" and "of what stays with it" in left["reason"]
        assert left["reason"].isprintable()


def test_a_masked_array_is_no_update(make_config, monkeypatch):
    def masked(update, kept):
        return Packet(update.manifest, np.ma.masked_array(update.vector, mask=update.vector > 0)), kept

    for record in played(make_config, monkeypatch, masked, method__name="fedit"):
        (left,) = record["dropped"]
        assert left["client"] == "client-2" and "is no vector" in left["reason"]
