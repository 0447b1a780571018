"""The ranks of one worker on Ray: the worker's own actor is the first, and has an actor for each of the others.

| event                                           | what follows                                                       |
|-------------------------------------------------|--------------------------------------------------------------------|
| the first rank's process dies                   | Ray ends its actors with it; it restarts, and makes new ones       |
| another rank's process dies                     | the first one ends itself: as above                                |
| all ranks raise the same, where all stand alike | the client has failed; the group goes on                           |
| one raises (out of memory) where others wait    | the client has failed; the group is made anew before the next call |

So a group is made anew as a whole, by the restart that a lone worker has, and `failures.py` needs no word of ranks.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedray.config.sections import Config
from fedray.errors import RankError
from fedray.federation.dispatch import one_line
from fedray.federation.logs import event
from fedray.ranks import FirstRankError, Group, Meeting, Ranks, open_meeting
from fedray.training.local import LocalTrainer

T = TypeVar("T")

#: So long the ranks may take to end a call after one of them has failed in it, if they all stand alike.
IN_STEP_SECONDS = 20.0
POLL_SECONDS = 0.5


class RankActor:
    """One of the other ranks: a `LocalTrainer` that does what the first has it do."""

    def __init__(self, config: Config, device: str, threads: int, reads: Sequence[str]):
        self._made = config, device, threads, reads

    def ready(self) -> bool:
        """Answers when the actor is up."""
        return True

    def join(self, rank: int, world: int, meeting: Meeting) -> None:
        """Meet the others, and load the model."""
        config, device, threads, reads = self._made
        group = Group(rank, world, device, meeting)
        self._trainer = LocalTrainer(config, device, threads, reads=reads, ranks=group)

    def do(self, call: str, arguments: tuple[Any, ...]) -> Any:
        """A call of `LocalTrainer`. What training gives is the same on the first rank: it stays here."""
        given = getattr(self._trainer, call)(*arguments)
        return given if call == "evaluate" else None


class RayCrew:
    """The other ranks' actors, in the bundles of the first one's placement group with these numbers."""

    def __init__(self, config: Config, device: str, threads: int, reads: Sequence[str], bundles: Sequence[int]):
        group, world = get_current_placement_group(), len(bundles) + 1
        assert group is not None, "a worker lives in its run's placement group"
        gpus = config.worker.gpus if device == "cuda" else 0
        self._others: list[Any] = [
            ray.remote(RankActor)
            .options(
                num_cpus=threads,
                num_gpus=gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
            )
            .remote(config, device, threads, reads)
            for bundle in bundles
        ]
        self._out_of_step = False
        _all([other.ready.remote() for other in self._others])
        meeting, store = open_meeting(ray.util.get_node_ip_address(), world)
        self._joined = [other.join.remote(rank, world, meeting) for rank, other in enumerate(self._others, start=1)]
        with self._watched(self._joined):
            self.ranks: Ranks = Group(0, world, device, meeting, store)

    def wait(self) -> None:
        """Until all have loaded the model. Raises what one of them raised."""
        _all(self._joined)

    def do(self, call: str, arguments: tuple[Any, ...], own: Callable[[], T]) -> tuple[T, list[Any]]:
        """See `Crew.do`."""
        if self._out_of_step:
            if call == "reset":
                return own(), []
            _end("the ranks are out of step")
        told = ray.put(arguments)
        references = [other.do.remote(call, told) for other in self._others]
        try:
            with self._watched(references):
                given = own()
        except Exception as error:
            self._after(error, references)
            raise
        return given, [self._given(rank, reference) for rank, reference in enumerate(references, start=1)]

    def _given(self, rank: int, reference: Any) -> Any:
        """What another rank gave. Raises RankError for what it raised; does not return where it died."""
        try:
            return ray.get(reference)
        except RayActorError as error:
            _end(f"rank {rank} died: {one_line(error)}")
        except RayTaskError as error:
            self._out_of_step = True
            raise _rank_error(rank, error) from error

    def _after(self, error: Exception, references: list[Any]) -> None:
        """This rank's part failed: see whether the others' did alike. Raises RankError where another one's failure came
        first."""
        freed = self._out_of_step  # by another rank's failure: this one's is but that it waited
        ready, late = ray.wait(references, num_returns=len(references), timeout=IN_STEP_SECONDS)
        self._out_of_step = freed or bool(late)
        for reference in ready:
            rank = references.index(reference) + 1
            try:
                ray.get(reference)
                self._out_of_step = True
            except RayActorError as died:
                _end(f"rank {rank} died: {one_line(died)}")
            except RayTaskError as theirs:
                alike = type(theirs.cause) is type(error) or isinstance(theirs.cause, FirstRankError)
                if freed or not alike:
                    self._out_of_step = True
                    raise _rank_error(rank, theirs) from error

    @contextlib.contextmanager
    def _watched(self, references: list[Any]) -> Iterator[None]:
        """While this rank does its part: where another one ends without it, this one must not wait for ever."""
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(references, done), daemon=True)
        watch.start()
        try:
            yield
        finally:
            done.set()
            watch.join()

    def _watch(self, references: list[Any], done: threading.Event) -> None:
        while not done.wait(POLL_SECONDS):
            ready, _ = ray.wait(references, num_returns=len(references), timeout=0)
            for rank in (references.index(reference) + 1 for reference in ready):
                try:
                    ray.get(references[rank - 1])
                except RayActorError as error:
                    _end(f"rank {rank} died: {one_line(error)}")
                except RayTaskError:
                    self._free(rank, done)
                    return

    def _free(self, rank: int, done: threading.Event) -> None:
        """Another rank has failed, and this one may wait for it: give it time to fail alike, then cut the line."""
        if done.wait(IN_STEP_SECONDS):
            return
        self._out_of_step = True
        ray.kill(self._others[rank - 1])
        if not done.wait(IN_STEP_SECONDS):
            _end(f"rank {rank} failed, and this one waits for it")


def _all(references: list[Any]) -> None:
    """Wait for the other ranks to begin. Raises what one of them raised; does not return where one died, which may be
    its node's end: a restart finds another place for it."""
    try:
        ray.get(references)
    except RayActorError as error:
        _end(f"a rank died before it began: {one_line(error)}")


def _rank_error(rank: int, error: RayTaskError) -> RankError:
    cause = error.cause
    return RankError(f"on rank {rank}: {type(cause).__name__}: {cause}")


def _end(why: str) -> Any:
    """This process, and with it all ranks: Ray restarts the first, which makes the others anew."""
    event("the ranks end", logging.ERROR, cause=why)
    time.sleep(0.1)  # the line is on its way to Ray's log
    os._exit(1)
