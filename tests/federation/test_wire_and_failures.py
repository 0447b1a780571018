"""Wire, checkpoint, placement and the failure policy: plain values, no engine."""

import numpy as np
import pytest
import torch

from fedray.adapters import ADAPTERS, Layer
from fedray.config.read import from_dict
from fedray.errors import ConfigError
from fedray.federation import checkpoint
from fedray.federation.failures import Action, ClientState, after_client, after_round, needed_of
from fedray.federation.placement import place
from fedray.federation.wire import Packet, UnpackOnce, decode, encode, pack, unpack
from fedray.methods import FedEx, Increment, Spec, Update
from fedray.methods.fra import FRAFFA, FlexLoRA

SPEC = Spec(ADAPTERS["lora"](), (Layer("wide", 7, 11, 2, 0.5), Layer("tall", 13, 5, 2, 0.5)), 3)


def played(method, rounds=2):
    state = method.init(SPEC, {"head.weight": torch.ones(2, 3)})
    for t in range(rounds):
        view = method.view(SPEC, method.broadcast(state), "a")
        names = [n for n in view.tensors if n in state.heads or n.rsplit(".", 1)[1] in view.trained]
        g = torch.Generator().manual_seed(t)
        updates = [
            Update(c, w, {n: view.tensors[n] + torch.randn(view.tensors[n].shape, generator=g) for n in names})
            for c, w in (("a", 1), ("b", 3))
        ]
        state, _ = method.aggregate(state, updates)
    return state


def test_clients_that_train_together_share_what_is_unpacked_and_no_dictionary():
    packet = pack({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)})
    once = UnpackOnce()
    one, other, changed = once(packet.again()), once(packet.again()), once(pack({"a": torch.zeros(2, 3)}))
    assert all(one[n].data_ptr() == other[n].data_ptr() for n in one) and one is not other
    same = unpack(packet)
    assert all(torch.equal(one[n], same[n]) for n in same) and changed.keys() == {"a"}


def test_pack_is_one_vector_of_exactly_the_numbers_and_unpack_gives_them_back():
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(5), "empty": torch.zeros(0, 3)}
    packet = pack(tensors)
    assert packet.vector.dtype == np.float32 and packet.nbytes == 4 * 17 == packet.vector.tobytes().__len__()
    packet.vector.setflags(write=False)  # as it comes out of the object store
    back = unpack(packet)
    assert list(back) == ["a", "b", "empty"] and all(torch.equal(back[n], t) for n, t in tensors.items())
    back["a"].add_(1)
    with pytest.raises(ValueError, match="does not fit a manifest"):
        unpack(Packet(packet.manifest, np.zeros(18, np.float32)))


@pytest.mark.parametrize("method", [FedEx(), FRAFFA(fra_rounds=1)], ids=lambda m: m.name)
def test_a_broadcast_survives_the_wire_and_packs_an_increment_once(method):
    state = played(method)
    first = encode(method.broadcast(state), {}, SPEC)
    again = encode(method.broadcast(state), first.increments, SPEC)
    assert all(again.increments[v] is p for v, p in first.increments.items())
    assert [i[2] for i in first.header.increments] == [first.increments[i[0]].digest for i in first.header.increments]
    got = decode(first.header, unpack(first.packet), {v: unpack(p) for v, p in first.increments.items()})
    for client in ("a", None):
        one, other = method.view(SPEC, got, client), method.view(SPEC, state, client)
        assert one.trained == other.trained and all(torch.equal(one.tensors[n], t) for n, t in other.tensors.items())
        assert all(torch.equal(one.base[n].dense(), d.dense()) for n, d in other.base.items())


@pytest.mark.parametrize("method", [FedEx(), FRAFFA(fra_rounds=1)], ids=lambda m: m.name)
def test_a_checkpoint_gives_back_the_state_and_only_whole_ones_count(method, tmp_path):
    state = played(method)
    saved = checkpoint.Checkpoint(
        state, {"a": 1}, {"a//b": {"x/exp_avg": torch.ones(2), "step": torch.tensor([3.0])}}, ({"round": 2},)
    )
    checkpoint.save(tmp_path, saved)
    (tmp_path / ".writing-99").mkdir()  # what a kill in the middle of the next one leaves
    found = checkpoint.latest(tmp_path, SPEC)
    assert (
        found.seen == {"a": 1}
        and found.records == ({"round": 2},)
        and torch.equal(found.kept["a//b"]["x/exp_avg"], torch.ones(2))
    )
    assert found.state.round == state.round and found.state.trained == state.trained and found.state.draw == state.draw
    assert all(torch.equal(found.state.tensors[n], t) for n, t in state.tensors.items())
    assert [i.version for i in found.state.increments] == [i.version for i in state.increments]
    assert found.state.heads == state.heads and isinstance(found.state.increments[0], Increment)


def test_the_last_two_checkpoints_are_kept(tmp_path):
    for rounds in (1, 2, 3):
        checkpoint.save(tmp_path, checkpoint.Checkpoint(played(FedEx(), rounds), {}))
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["round-00002", "round-00003"]
    assert checkpoint.latest(tmp_path, SPEC).state.round == 3
    assert checkpoint.latest(tmp_path / "nowhere", SPEC) is None


def test_terminal_states():
    assert {s for s in ClientState if not s.terminal} == {ClientState.WAITING, ClientState.TRAINING}


def test_failure_policy():
    assert after_client(ClientState.WORKER_DIED, "a", 1, "oom").action is Action.REPEAT
    assert after_client(ClientState.WORKER_DIED, "a", 3, "oom").action is Action.LEAVE_OUT
    assert after_client(ClientState.LATE, "a", 1).action is Action.LEAVE_OUT
    raised = after_client(ClientState.RAISED, "ward-7", 1, "bad row")
    assert raised.action is Action.LEAVE_OUT and "ward-7" in raised.reason and "bad row" in raised.reason
    with pytest.raises(ValueError):
        after_client(ClientState.REPORTED, "a", 1)
    assert after_round(5, 4, needed_of(5, 0.8), 1, []).action is Action.AGGREGATE
    assert after_round(5, 3, needed_of(5, 0.8), 1, ["x"]).action is Action.RETRY_ROUND
    failed = after_round(5, 3, needed_of(5, 0.8), 2, ["client 'a': late"])
    assert (
        failed.action is Action.FAIL
        and "3 of 5 clients reported and 4 are needed" in failed.reason
        and "client 'a': late" in failed.reason
    )


def test_placement():
    def ask(clients, have_cpus, have_gpus, engine="ray", cohort=None, **worker):
        return place(
            from_dict({"worker": worker, "engine": engine, "federation": {"cohort": cohort}}),
            clients,
            have_cpus,
            have_gpus,
        )

    assert (ask(3, 2, 0).workers, ask(3, 2, 0).cpus, ask(3, 2, 0).device) == (2, 1, "cpu")
    assert (ask(3, 16, 4).workers, ask(3, 16, 4).gpus, ask(3, 16, 4).cpus, ask(3, 16, 4).device) == (3, 1.0, 5, "cuda")
    assert ask(7, 16, 3, gpus=0.5).workers == 6
    assert ask(100, 16, 0, cohort=3).workers == 3
    assert ask(3, 2, 0, engine="inline").workers == 1 and ask(3, 8, 0, engine="inline", cpus=2).cpus == 2
    assert "in turn" in ask(5, 2, 0).reason and "its own" in ask(2, 2, 0).reason
    with pytest.raises(ConfigError, match="3 workers x 1 GPUs = 3 GPUs, but there are 2"):
        ask(3, 16, 2, count=3)
    with pytest.raises(ConfigError, match="4 workers x 2 CPUs = 8 CPUs, but there are 4"):
        ask(9, 4, 0, count=4, cpus=2)


def test_clients_of_smaller_rank_receive_smaller_packets_and_equal_ranks_share_one():
    spec = Spec(ADAPTERS["lora"](), SPEC.layers, 3, {"a": 2, "b": 1, "c": 1})
    state = FlexLoRA().init(spec, {"head.weight": torch.ones(2, 3)})
    message = encode(FlexLoRA().broadcast(state), {}, spec)
    assert message.packet_of("b") is message.packet_of("c") and message.packet_of("a").nbytes == message.packet.nbytes
    assert message.packet_of("b").nbytes == 4 * (6 + sum(layer.m + layer.n for layer in SPEC.layers))
    view = FlexLoRA().view(spec, decode(message.header, unpack(message.packet_of("b")), {}), "b")
    assert view.tensors["wide.lora_A"].shape == (2, 11) and not view.tensors["wide.lora_A"][1:].any()
