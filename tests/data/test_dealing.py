"""How examples are dealt to clients, and who holds what."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from support import SCRIPTS

from fedray.config.read import from_dict
from fedray.data.partition import load_data
from fedray.errors import ConfigError
from fedray.report.holdings import LABELS, ROWS, holdings, picture_of, table_of


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """600 rows of six labels, each row once, and a class of its own for each of 30."""
    file = tmp_path_factory.mktemp("dealt") / "rows.jsonl"
    rows = [{"text": f"row number {i}", "label": f"label-{i % 6}", "fine": f"f{i % 30}"} for i in range(600)]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(file)


def config(source, partition, clients=6, seed=0, **data):
    values = {"source": source, "partition": partition, "held_out": 0.1, **data}
    return from_dict(
        {
            "model": {"path": "m", "task": "classification"},
            "data": values,
            "federation": {"clients": clients},
            "seed": seed,
        }
    )


def dealt(*arguments, **options):
    return load_data(config(*arguments, **options)).train


PARTITIONS = ["iid", "dirichlet", "pathological", "shards", "quantity"]


@pytest.mark.parametrize("partition", PARTITIONS)
def test_every_row_has_one_holder_and_the_seed_decides_who(source, partition):
    one, same, other = (dealt(source, partition, seed=seed) for seed in (0, 0, 1))
    texts = [text for part in one.values() for text in part["text"]]
    assert len(texts) == len(set(texts)) == 540
    assert all(len(part) for part in one.values())
    assert [part["text"] for part in one.values()] == [part["text"] for part in same.values()]
    assert [part["text"] for part in one.values()] != [part["text"] for part in other.values()]


@pytest.mark.parametrize("each", [1, 2, 3])
def test_pathological_clients_have_so_many_labels(source, each):
    parts = dealt(source, "pathological", labels_per_client=each)
    assert all(len(set(part["label"])) == each for part in parts.values())


@pytest.mark.parametrize("each", [1, 2])
def test_shards_hold_few_labels(source, each):
    parts = dealt(source, "shards", shards_per_client=each)
    assert all(len(set(part["label"])) <= 2 * each for part in parts.values())
    assert len({len(part) for part in parts.values()}) == 1
    many = dealt(source, "shards", shards_per_client=50)
    assert sum(map(len, many.values())) == 540


def test_quantities_differ_and_labels_do_not(source):
    parts = dealt(source, "quantity", alpha=0.5)
    sizes = [len(part) for part in parts.values()]
    assert sum(sizes) == 540 and max(sizes) > 4 * min(sizes) and min(sizes) >= 1
    largest = Counter(max(parts.values(), key=len)["label"])
    assert max(largest.values()) < 2 * min(largest.values())
    even = [len(part) for part in dealt(source, "quantity", alpha=1e6).values()]
    assert max(even) - min(even) <= 2


def test_what_cannot_be_dealt_is_refused(source):
    with pytest.raises(ConfigError, match="data.labels_per_client 9 is more than the 6 labels there are: lower it"):
        dealt(source, "pathological", labels_per_client=9)
    with pytest.raises(ConfigError, match="data.labels_per_client 2 of 2 clients leave out some of the 6 labels"):
        dealt(source, "pathological", clients=2)
    with pytest.raises(ConfigError, match="data.shards_per_client 300 of 6 clients are more than 540 examples"):
        dealt(source, "shards", shards_per_client=300)
    with pytest.raises(ConfigError, match="540 training examples are fewer than 700 clients"):
        dealt(source, "quantity", clients=700)
    with pytest.raises(ConfigError, match="data.label 'mood' is not a column"):
        dealt(source, "shards", label="mood")


def test_who_holds_what_counts_every_row(source):
    given = config(source, "dirichlet", label="fine", clients=4)
    found, parts = holdings(given), load_data(given).train
    for client, part in parts.items():
        assert found.size(client) == len(part)
        fine = Counter(part["fine"])
        assert all(found.rows[client][name] == fine[name] for name in found.labels)
    assert len(found.labels) == LABELS and any("others" in row for row in found.rows.values())
    assert table_of(found).row_count == 4
    axes = picture_of(found).axes[0]
    assert sum(bar.get_width() for bar in axes.patches) == sum(map(found.size, found.rows))


def test_of_many_clients_the_largest_and_the_smallest_are_shown(source):
    found = holdings(config(source, "iid", clients=100))
    assert table_of(found).row_count == ROWS + 1


def test_the_command_prints_the_table_and_writes_the_picture(source, tmp_path, run_fedray):
    words = f"--model.path m --model.task classification --data.source {source} --federation.clients 3"
    said = run_fedray(f"holdings {words} --out {tmp_path / 'who.png'}")
    assert said.returncode == 0 and "client-2" in said.stdout and (tmp_path / "who.png").read_bytes()[1:4] == b"PNG"
    refused = run_fedray(f"holdings {words} --out {tmp_path / 'who.doc'}")
    assert refused.returncode == 2 and "--out" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


@pytest.fixture
def run_fedray():
    import subprocess

    def call(words):
        return subprocess.run(
            [SCRIPTS / "fedray", *words.split()], capture_output=True, text=True, check=False, timeout=90
        )

    return call
