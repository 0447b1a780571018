"""The table of who learns what: one source, in all places, for every mode."""

import json

import pytest
from support import ROOT

from fedray.cli import main
from fedray.config.read import from_dict
from fedray.federation.channels import threats

CLIENT = {"unit": "client", "epsilon": 2.0}
CONFIGS = {
    "plain": {},
    "sums": {"secure_aggregation": True},
    "example": {"epsilon": 2.0},
    "example, sums": {"epsilon": 2.0, "secure_aggregation": True},
    "client": CLIENT,
    "client, sums": CLIENT | {"secure_aggregation": True},
    "nobody": CLIENT | {"secure_aggregation": True, "trust": "nobody"},
}


def test_the_pages_have_the_table_as_the_command_prints_it(capsys):
    assert main(["threats", "--markdown"]) == 0
    table = capsys.readouterr().out.strip()
    assert table == threats.markdown()
    for page in ("README.md", "k8s/README.md"):
        text = (ROOT / page).read_text()
        assert text.split("<!-- threats: `fedray threats --markdown` -->\n")[1].split("\n<!-- end of")[0] == table, page
    assert main(["threats"]) == 0
    said = capsys.readouterr().out
    assert all(who in said for who in threats.THREATS)
    assert main(["threats", "--json"]) == 2


@pytest.mark.parametrize("mode", threats.MODES)
def test_every_config_has_its_mode_and_every_party_its_line(mode):
    config = from_dict({"method": {"name": "ffa"}, "privacy": CONFIGS[mode]})
    assert threats.mode_of(config) == mode
    lines = threats.lines(config)
    assert [line["who"] for line in lines] == list(threats.THREATS) and all(line["learns"] for line in lines)
    assert json.loads(json.dumps(lines)) == lines
    of = {line["who"]: line["learns"] for line in lines}
    # Who runs code in the workers is told to learn everything, whatever the mode; who follows the protocol is not.
    assert of["a coordinator, or a client, with code of its own"].startswith("everything on the cluster's workers")
    private = "epsilon" in of["a curious coordinator"]
    assert private == (mode in ("example", "example, sums", "nobody"))
