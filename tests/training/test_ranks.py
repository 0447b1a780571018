"""A client of two ranks against the same client of one: the oracle is `LocalTrainer` alone."""

import pickle

import pytest
import torch
from support import OPTIONS, distance, trainer_and_view
from two_ranks import on_a_rank, trains

from fedray.errors import PrivacyError
from fedray.methods import View
from fedray.privacy.keys import Key
from fedray.privacy.plan import Mechanism
from fedray.privacy.private import Private
from fedray.ranks import ALONE, SHARE, Group, open_meeting

#: Whoever asks first for what both ranks found waits for all of it.
pytestmark = pytest.mark.timeout(600)

PLAIN = [
    *((options, "causal-lm") for options in ("plain", "accumulate", "ffa", "proximal", "lora-sb", "abba", "ravan")),
    *((options, "classification") for options in ("plain", "tight-clip")),
]


def private(clip, noise, rate) -> Private:
    return Private(Key(b"7" * 32), ("round", 0), rate, Mechanism(clip, noise, 8.0))


#: Nearly everyone, a few, and so few that some samples are empty, of which a rank or both have nothing.
PRIVATE = {"many": private(0.05, 0.0, 0.9), "few": private(0.05, 1.0, 0.1), "hardly any": private(0.05, 1.0, 0.03)}


@pytest.fixture(scope="module")
def found(make_config, tmp_path_factory):
    """By case: what one rank gives, and what each of two does."""
    names, cases, alone = [], [], []

    def add(name, stage, plan=None, **options):
        worker = {"cpus": 1, "zero_stage": stage} if stage < 4 else {"cpus": 1, "zero_stage": 3, "offload": "all"}
        options = {"federation__local_steps": 3, "federation__lr": 3e-4, "federation__batch_size": 6} | options
        config = make_config(**options, worker=worker)
        config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": 0.0})})
        one = config.model_copy(
            update={"worker": config.worker.model_copy(update={"zero_stage": 0, "offload": "none"})}
        )
        trainer, view = trainer_and_view(one)
        names.append((name, stage))
        alone.append(trains(trainer, view, plan))
        cases.append((config, View(view.tensors, dict(view.base), view.trained), plan))

    for stage in range(5):
        for options, task in PLAIN:
            if stage == 3 or options in ("plain", "accumulate"):
                add(f"{options}, {task}", stage, task=task, **OPTIONS[options])
        add("keep", stage, federation__keep_optimizer=True)
        for name, plan in PRIVATE.items():
            add(name, stage, plan, privacy={"noise": 1.0}, **OPTIONS["abba" if name == "few" else "plain"])
    file = tmp_path_factory.mktemp("ranks") / "found"
    meeting, _store = open_meeting("127.0.0.1", 2)
    torch.multiprocessing.spawn(on_a_rank, (meeting, cases, str(file)), nprocs=2)
    ranks = [pickle.loads(file.with_name(f"found-{rank}").read_bytes()) for rank in range(2)]
    return {name: (alone[i], ranks[0][i], ranks[1][i]) for i, name in enumerate(names)}


@pytest.mark.parametrize("stage", range(5), ids=["zero 0", "zero 1", "zero 2", "zero 3", "zero 3, offloaded"])
def test_two_ranks_give_what_one_gives(found, stage):
    cases = {name: results for (name, at), results in found.items() if at == stage}
    assert len(cases) == (9 if stage == 3 else 3) + 4
    for name, (alone, first, other) in cases.items():
        for one, two, twin in zip(alone[:2], first[:2], other[:2], strict=True):
            assert distance(one.tensors, two.tensors) < 1e-5, name
            assert distance(two.tensors, twin.tensors) == 0.0, name  # whichever rank is asked
            assert one.loss is two.loss is None or one.loss == pytest.approx(two.loss, abs=1e-5), name
            assert two.loss == twin.loss and one.examples == two.examples
            assert one.optimizer_state.keys() == two.optimizer_state.keys()
            if one.optimizer_state:
                assert distance(one.optimizer_state, two.optimizer_state) < 1e-5
        assert distance(alone[0].tensors, alone[1].tensors) > 1e-4  # it did train


def test_metrics_are_dealt_out_batch_by_batch(found):
    for (name, stage), (of_alone, of_first, of_other) in found.items():
        assert of_alone[3] == of_first[3] == of_other[3] == 0.0
        for alone, first, other in zip(of_alone[2], of_first[2], of_other[2], strict=True):
            assert (len(first), len(other)) == (-(-len(alone) // 2), len(alone) // 2)
            shares = [first, other]
            both = [shares[turn % 2][turn // 2] for turn in range(len(alone))]
            for one, two in zip(alone, both, strict=True):
                assert [s["group"] for s in one] == [s["group"] for s in two], (name, stage)
                assert [s["loss"] for s in one] == pytest.approx([s["loss"] for s in two], abs=1e-4), (name, stage)
    assert {len(batches) for results in found.values() for batches in results[0][2]} >= {1, 2}  # one batch, two ranks


def test_an_empty_sample_still_moves_what_trains_by_the_same_noise(found):
    """At this rate some steps see nobody: the noise is all there is, and it is drawn once."""
    for stage in range(5):
        alone, first, _ = found["hardly any", stage]
        assert distance(alone[0].tensors, first[0].tensors) < 1e-5


# --- parts of a batch ---------------------------------------------------------------------------------------------


class Fake(Group):
    """A group whose other ranks are not there: what they would say is not asked for."""

    def __init__(self, rank, world):
        self.rank, self.world = rank, world


@pytest.mark.parametrize("rows, world", [(1, 2), (2, 2), (3, 2), (5, 4), (4, 3)])
def test_the_parts_losses_make_the_whole_ones_mean(rows, world):
    values = torch.arange(1.0, rows + 1)
    batch = {"value": values, "labels": torch.arange(rows) % 3}
    counted = lambda b: int((b["labels"] > 0).sum())  # noqa: E731

    def loss(forward, b):
        assert SHARE not in b
        return (b["value"] * (b["labels"] > 0)).sum() / max(1, counted(b))

    parts = [Fake(rank, world).part_of_mean(batch, counted) for rank in range(world)]
    mean = sum(Fake(0, world).weighed(loss)(None, part) for part in parts) / world
    torch.testing.assert_close(mean, torch.as_tensor(loss(None, batch), dtype=torch.float32))
    each = [
        Fake(0, world).weighed(lambda _, b: b["value"])(None, Fake(r, world).part_of_sum(batch)) for r in range(world)
    ]
    assert sum(part.sum() for part in each) == values.sum()
    dealt = [Fake(rank, world).dealt(list(values.tolist())) for rank in range(world)]
    assert len({len(items) for items, _ in dealt}) == 1  # all do as many
    assert sorted(x for items, own in dealt for x in items[:own]) == values.tolist()


def test_one_rank_leaves_everything_as_it_is():
    batch = {"labels": torch.ones(3)}
    assert ALONE.part_of_mean(batch, len) is batch and ALONE.part_of_sum(batch) is batch and ALONE.world == 1
    assert ALONE.weighed(len) is len and ALONE.mean(2.0) == 2.0 and ALONE.from_first(lambda: 7) == 7
    assert ALONE.dealt([1, 2]) == ([1, 2], 2)


def test_no_other_rank_can_draw_from_the_clients_key():
    plan = pickle.loads(pickle.dumps(PRIVATE["few"].of_other_rank()))
    for kind in ("sample", "noise"):
        with pytest.raises(PrivacyError, match="stays with its first rank"):
            plan.stream(kind, 0)
    assert b"7" * 32 not in pickle.dumps(PRIVATE["few"].of_other_rank())
