"""The names of a run's clients, from as little data as they need."""

import json

import pytest

from fedray.config.read import from_dict
from fedray.data.partition import client_names, load_data


@pytest.mark.parametrize(
    "data",
    [
        {"partition": "iid"},
        {"partition": "column", "column": "author"},
        {"partition": "column", "column": "author", "limit": 6, "evaluate_on": "validation"},
        {"partition": "column", "column": "number"},
    ],
    ids=["iid", "column", "a column of which some values are left", "a column of numbers"],
)
def test_names_are_those_of_the_data_that_are_dealt_out(data, tiny, tmp_path):
    rows = [json.loads(line) for line in (tiny / "text.jsonl").read_text().splitlines()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row | {"number": i % 12}) + "\n" for i, row in enumerate(rows)))
    config = from_dict({"data": {"source": str(file), **data}})
    assert client_names(config) == load_data(config).clients


@pytest.mark.parametrize("partition, clients", [("dirichlet", None), ("dirichlet", 3), ("iid", 11)])
def test_names_of_clients_that_have_none_by_nature(partition, clients, tiny):
    values = {
        "model": {"path": str(tiny / "bert"), "task": "classification"},
        "data": {"source": str(tiny / "classes.csv"), "partition": partition, "alpha": 50.0},
        "federation": {"clients": clients},
    }
    config = from_dict(values)
    assert client_names(config) == load_data(config).clients


@pytest.mark.parametrize("more", [{}, {"evaluate_on": "validation", "limit": 40}], ids=["all", "some"])
def test_names_of_the_built_in_corpus(more):
    config = from_dict({"data": more})
    assert client_names(config) == load_data(config).clients


def test_names_of_clients_with_their_own_sources(tiny, tmp_path):
    (tmp_path / "test.jsonl").write_text((tiny / "text.jsonl").read_text())
    clients = {name: {"source": str(tiny / "text.jsonl")} for name in ("ward", "icu")}
    config = from_dict({"clients": clients, "data": {"source": str(tmp_path)}})
    assert client_names(config) == load_data(config).clients == ["ward", "icu"]
