"""The built-in corpus: the source code of the Python standard library that is running.

Every Python ships it, so the demo needs no network and no files. A client is a package (a natural non-iid split:
each has its own vocabulary and habits), and the shipped base model was pretrained on the *other* packages.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

#: The word that means the built-in corpus in `data.source`, and the built-in model in `model.path`.
BUILTIN = "builtin"
#: Packages that hold the demo's private data: one client each. Never part of the pretraining text.
CLIENT_PACKAGES = ("asyncio", "email", "multiprocessing", "unittest", "xml")
#: Machine-made tables, vendored wheels and tests: no text worth modelling.
_SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "ensurepip", "__pycache__"}
)
HELD_OUT_BYTES = 8_000
BASE_MODEL = Path(__file__).parent.parent / "assets" / "builtin-base"


def _stdlib() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _sources(paths: Iterable[Path]) -> list[tuple[str, str]]:
    root = _stdlib()
    texts = []
    for path in sorted(paths):
        relative = path.relative_to(root)
        if _SKIPPED_PARTS.isdisjoint(relative.parts):
            texts.append((relative.as_posix(), path.read_bytes().decode("utf-8", errors="replace")))
    return texts


def client_texts() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, held-out rows), each `package`, `path`, `text`, sorted by path.

    The last sixth of every file is held out; of that, about `HELD_OUT_BYTES` a package are kept, so that an
    evaluation takes seconds. Raises FileNotFoundError, naming the package, where a Python was installed without part
    of its library.
    """
    train, held_out = [], []
    for package in CLIENT_PACKAGES:
        files = _sources((_stdlib() / package).rglob("*.py"))
        if not files:
            raise FileNotFoundError(
                f"the built-in demo reads the standard library's own source, but {_stdlib() / package} holds none: "
                "use a full Python, or give --data.source"
            )
        ends = []
        for path, text in files:
            cut = len(text) * 5 // 6
            train.append({"package": package, "path": path, "text": text[:cut]})
            ends.append({"package": package, "path": path, "text": text[cut:]})
        # A fixed shuffle by hash, so that every worker keeps the same files and no part of the alphabet is favoured.
        taken = 0
        for row in sorted(ends, key=lambda r: hashlib.sha256(r["path"].encode()).digest()):
            if taken < HELD_OUT_BYTES:
                held_out.append(row | {"text": row["text"][: HELD_OUT_BYTES - taken]})
                taken += len(row["text"])
    return train, sorted(held_out, key=lambda r: r["path"])


def pretraining_text() -> str:
    """All other packages and top-level modules, joined: what `jobs/pretrain_builtin.py` trains the base on."""
    root = _stdlib()
    others = [p for p in root.rglob("*.py") if p.relative_to(root).parts[0] not in CLIENT_PACKAGES]
    return "\n".join(text for _, text in _sources(others))
