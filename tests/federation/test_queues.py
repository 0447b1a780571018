"""Who goes first, and who shares a task: nothing of a result follows from it, so it is held against its own rules."""

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from support import run, same_bits

from fedray.federation import worker_ray
from fedray.federation.dispatch import Dispatch, Part, Workers, results_of
from fedray.federation.messages import Failure, Trained
from fedray.federation.queues import ENOUGH, TASK_SECONDS, Queue, Speeds
from fedray.federation.worker import Worker


def told(seconds: dict[str, float]) -> Speeds:
    speeds = Speeds()
    for client, value in seconds.items():
        speeds.saw([client], value, [0.0])
    return speeds


def tasks_of(queue: Queue) -> list[list[str]]:
    tasks = []
    while task := queue.take():
        tasks.append(task)
    return tasks


@given(
    seconds=st.dictionaries(st.text("abc", min_size=1, max_size=3), st.floats(1e-4, 1.0), max_size=30),
    unknown=st.integers(0, 5),
    workers=st.integers(1, 4),
)
def test_every_client_is_in_one_task_longest_first_and_no_task_is_long(seconds, unknown, workers):
    speeds, clients = told(seconds), [*seconds, *(f"new-{i}" for i in range(unknown))]
    tasks = tasks_of(Queue(clients, workers, speeds))
    flat = [client for task in tasks for client in task]
    assert sorted(flat) == sorted(clients) and len(flat) == len(set(flat))
    assert flat[:unknown] == clients[len(seconds) :]  # the never seen ones may be the longest
    known = [seconds[client] for client in flat[unknown:]]
    assert known == sorted(known, reverse=True)
    for task in tasks:
        assert len(task) == 1 or sum(speeds.of(client) for client in task) <= TASK_SECONDS * (1 + 1e-9)


def test_short_clients_share_tasks_and_the_last_ones_are_shared_out():
    clients = [f"c{i}" for i in range(100)]
    sizes = [len(task) for task in tasks_of(Queue(clients, 2, told(dict.fromkeys(clients, 1e-3))))]
    assert sizes[0] == 25 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 1
    assert len(sizes) < 20


def test_of_clients_that_were_never_seen_the_last_ones_tell():
    speeds = Speeds()
    assert speeds.of("new") is None
    speeds.saw(["a", "b"], 0.3, [2.0, 1.0])
    assert speeds.of("a") == pytest.approx(0.2) and speeds.of("b") == pytest.approx(0.1) and speeds.of("new") is None
    speeds.saw(["c"] * ENOUGH, 0.3 * ENOUGH, [float("nan")] * ENOUGH)
    assert speeds.of("new") == pytest.approx(0.3)
    speeds.saw(["a", "b"], 1.0, ["much", 1.0])  # what a client says is no number
    assert speeds.of("a") == speeds.of("b") == 0.5


def test_clients_that_train_together_share_a_task_however_long():
    clients = [f"c{i}" for i in range(10)]
    assert [len(t) for t in tasks_of(Queue(clients, 2, Speeds(), together=4))] == [4, 4, 2]
    assert [len(t) for t in tasks_of(Queue(clients, 2, told(dict.fromkeys(clients, 9.0)), together=4))] == [4, 4, 2]


def test_who_is_put_back_is_tried_by_itself():
    clients = [f"c{i}" for i in range(40)]
    queue = Queue(clients, 1, told(dict.fromkeys(clients, 1e-3)))
    task = queue.take()
    for client in task:
        queue.put_back(client)
    assert [queue.take() for _ in task] == [[client] for client in reversed(task)]
    assert len(queue.take()) > 1


def test_what_is_no_list_of_results_is_refused():
    from fedray.errors import LostError

    assert results_of(2, [1, 2]) == [1, 2]
    for given_ in ([1], {"a": 1}, None):
        with pytest.raises(LostError, match="something else than 2 results"):
            results_of(2, given_)


@ray.remote(max_restarts=-1)
class Deadly:
    """Dies over one client, whoever shares its task."""

    def ready(self):
        return True

    def train(self, clients):
        import os

        if "poison" in clients:
            os._exit(1)
        reports = [Trained(c, 1, 0.0, 0.0, 0.0, 0) for c in clients]
        return [clients, *([None] * len(clients)), reports]


def test_a_client_that_kills_its_worker_costs_nobody_of_its_task(ray_session):
    """Told to be short, all clients share tasks; each is then tried alone, and only one kills three workers."""
    clients = [*(f"c{i}" for i in range(12)), "poison"]
    workers = Workers([Deadly.remote()], clients)
    speeds = told(dict.fromkeys(clients, 0.001) | {"poison": 2e-3})
    call = lambda worker, group: worker.train.options(num_returns=len(group) + 2).remote(list(group))  # noqa: E731
    outcomes = Dispatch(workers, clients, call, None, lambda client: None, speeds).run()
    assert [o.client for o in outcomes] == clients
    assert [o.client for o in outcomes if isinstance(o.report, Failure)] == ["poison"]
    assert "died 3 times" in outcomes[-1].report.cause
    assert all(isinstance(o.update, Part) for o in outcomes[:-1])
    ray.kill(workers.actors[0])


def test_tasks_of_several_clients_give_the_same_bits_as_one_by_one(make_config, ray_session, monkeypatch):
    """One of them fails in the middle of a task; what each keeps is its own."""

    class Failing(Worker):
        def train(self, client, round, *args):
            if (client, round) == ("client-3", 1):
                self.trainer.reset()
                return None, None, Failure(client, "it says so", "")
            return Worker.train(self, client, round, *args)

    options = dict(
        federation={"clients": 12, "rounds": 3, "local_steps": 1, "quorum": 0.5, "keep_optimizer": True},
        worker={"cpus": 1, "count": 1},
    )
    monkeypatch.setattr("fedray.federation.run.Worker", Failing)
    alone = run(make_config(**options))
    monkeypatch.setattr(worker_ray, "Worker", Failing)
    same_bits(alone, run(make_config(engine="ray", **options)))
