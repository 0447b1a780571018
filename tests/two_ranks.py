"""What the processes of `tests/training/test_ranks.py` do: the same calls on a client of one rank, or of two."""

import pickle

import torch
from support import moved

from fedray.lowrank import LowRank
from fedray.methods import View
from fedray.ranks import Group
from fedray.training.local import LocalTrainer


def trains(trainer, view, plan):
    """Two rounds of two clients, the second from where the first one's optimizer stopped; and metrics after them."""
    keep = trainer.config.federation.keep_optimizer
    first = trainer.train(moved(view), "client-1", 0, None, None, plan)
    base = {layer.name: LowRank(torch.ones(layer.m, 1), torch.ones(1, layer.n) * 0.01) for layer in trainer.layers}
    again = View(moved(view, 1).tensors, base, view.trained)
    second = trainer.train(again, "client-0", 1, first.optimizer_state if keep else None, "one", plan)
    parts = (("test", ""), ("train", "client-2"))
    return first, second, [trainer.evaluate(again, *part, (0, 1), "one") for part in parts], trainer.base_lost


def on_a_rank(rank, meeting, cases, file):
    """All cases, one after the other, in a process of its own."""
    torch.set_num_threads(1)
    group = Group(rank, 2, "cpu", meeting)
    found = []
    for config, view, plan in cases:
        trainer = LocalTrainer(config, "cpu", 1, ranks=group)
        theirs = plan.of_other_rank() if plan is not None and rank else plan
        found.append(trains(trainer, view, theirs))
        trainer._engine.close()
    with open(f"{file}-{rank}", "wb") as out:
        pickle.dump(found, out)
