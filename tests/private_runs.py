"""What tests of private runs share: ledgers, kills and resumes."""

from pathlib import Path

from fedray.federation import pool_inline
from fedray.privacy.keys import KeyStore
from fedray.privacy.ledger import Ledger

CLIENTS = ("client-0", "client-1", "client-2")


def ledger(folder: Path) -> Ledger:
    return Ledger.load(folder / "checkpoint" / "ledger.json")


def key_file(client: str) -> str:
    return KeyStore("x")._path("run", client).name


def known(records: list[dict]) -> list[dict]:
    """Records without what a clock says."""
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def resumed(config):
    return config.model_copy(update={"output": config.output.model_copy(update={"resume": True})})


def killed_after(monkeypatch, calls_left: int):
    """The job dies at a call for training, by a KeyboardInterrupt: nothing gets a chance to clean up."""
    calls = []

    def dies(self, *args, real=pool_inline.InlinePool.train):
        calls.append(1)
        if len(calls) == calls_left:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(pool_inline.InlinePool, "train", dies)


#: A run of every kind.
PRIVATE = {
    "fedit": {"method__name": "fedit", "privacy": {"epsilon": 3.0}},
    "fedex, ZeRO 2": {"method__name": "fedex", "privacy": {"epsilon": 3.0}, "worker": {"cpus": 1, "zero_stage": 2}},
    "fed-sb, private subspace": {
        "method__name": "fed-sb",
        "adapter": {"kind": "lora-sb", "rank": 2, "subspace": "private"},
        "privacy": {"epsilon": 8.0},
        "federation__lr": 0.1,
    },
    "abba, kept": {
        "adapter": {"kind": "abba", "rank": 4, "alpha": 4},
        "privacy": {"noise": 0.8},
        "federation__keep_optimizer": True,
    },
    "fedsa": {"method__name": "fedsa", "privacy": {"epsilon": 3.0}},
    "fedask": {"method__name": "fedask", "privacy": {"epsilon": 3.0}},
    "clients": {"method__name": "ffa", "privacy": {"epsilon": 8.0, "unit": "client", "adaptive_clip": 0.5}},
    "clients, sampled": {
        "method__name": "ravan",
        "adapter": {"kind": "ravan", "rank": 2},
        "privacy": {"noise": 1.0, "unit": "client"},
        "federation__cohort": 2,
    },
    "secure": {"method__name": "rolora", "privacy": {"epsilon": 3.0, "secure_aggregation": True}},
    "secure, clients": {
        "method__name": "fedit",
        "privacy": {"epsilon": 8.0, "unit": "client", "secure_aggregation": True},
    },
}
