"""Tokenised examples as a few flat arrays: a tenth of the memory of lists, and, kept in a file, read by all processes
of a machine through one copy in the page cache."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
from datasets import Dataset
from safetensors import safe_open
from safetensors.numpy import save_file

from fedray.data.owned import owned_folder
from fedray.data.tasks import Example, Task

_ARRAYS = ("ids", "id_ends", "labels", "label_ends", "sizes", "groups", "abouts", "about_ends", "cuts")


class Encoded(Sequence[Example]):
    """Examples, made when they are asked for. `arrays`: ids and labels (int32) and what is said about each (UTF-8) one
    after the other with where each example ends (int64), sizes (fp64), the number of each one's group among
    `names` (int32, -1: none), and whether it was cut."""

    def __init__(self, arrays: dict[str, np.ndarray], names: Sequence[str], order: np.ndarray | None = None):
        self._arrays, self._names = arrays, list(names)
        self._order = order if order is not None else np.arange(len(arrays["sizes"]))

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Encoded:
        """The same examples, packed."""
        names = sorted({e.group for e in examples if e.group is not None})
        number: dict[str | None, int] = {name: i for i, name in enumerate(names)} | {None: -1}
        ids, id_ends = _flat([e.input_ids for e in examples])
        labels, label_ends = _flat([e.labels for e in examples])
        sizes = np.array([e.size for e in examples], np.float64)
        groups = np.array([number[e.group] for e in examples], np.int32)
        abouts, about_ends = _flat([e.about.encode() for e in examples], np.uint8)
        cuts = np.array([e.cut for e in examples], np.uint8)
        arrays = (ids, id_ends, labels, label_ends, sizes, groups, abouts, about_ends, cuts)
        return cls(dict(zip(_ARRAYS, arrays, strict=True)), names)

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self._example(int(i)) for i in self._order[index]]
        return self._example(int(self._order[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self._example(int(i)) for i in self._order)

    def _example(self, i: int) -> Example:
        def row(name: str, ends: np.ndarray) -> np.ndarray:
            return self._arrays[name][int(ends[i - 1]) if i else 0 : int(ends[i])]

        group = int(self._arrays["groups"][i])
        return Example(
            row("ids", self._arrays["id_ends"]).tolist(),
            row("labels", self._arrays["label_ends"]).tolist(),
            float(self._arrays["sizes"][i]),
            self._names[group] if group >= 0 else None,
            row("abouts", self._arrays["about_ends"]).tobytes().decode(),
            bool(self._arrays["cuts"][i]),
        )

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each (int64)."""
        lengths: np.ndarray = np.diff(self._arrays["id_ends"], prepend=0)[self._order]
        return lengths

    @property
    def cut(self) -> int:
        """How many of them `data.max_length` left something out of."""
        return int(self._arrays["cuts"][self._order].sum())

    def by_length(self) -> Encoded:
        """The same examples, the shortest first; equal ones in their order."""
        return Encoded(self._arrays, self._names, self._order[np.argsort(self.lengths, kind="stable")])

    def digest(self) -> bytes:
        """32 bytes that other sequences or labels do not have."""
        digest = hashlib.sha256()
        for name in ("ids", "id_ends", "labels", "label_ends"):
            digest.update(
                len(self._arrays[name]).to_bytes(8, "big") + np.ascontiguousarray(self._arrays[name]).tobytes()
            )
        digest.update(np.ascontiguousarray(self._order).tobytes())
        return digest.digest()

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        part.unlink(missing_ok=True)
        os.close(
            os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        )  # nobody else reads it, from its first byte on
        save_file(self._arrays, part, metadata={"names": json.dumps(self._names)})
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Encoded:
        """What `save` wrote, mapped: pages are read when they are used, and shared with whoever else maps the file."""
        with safe_open(path, "pt") as file:
            return cls({name: file.get_tensor(name).numpy() for name in _ARRAYS}, json.loads(file.metadata()["names"]))


def encode(task: Task, rows: Dataset, folder: str | None = None, held_out: bool = False) -> Encoded:
    """The task's examples of these rows, for training or for metrics. `folder`: where they are kept for the next
    process that asks for the same, if anywhere; it is made for this user alone."""
    make = task.encode_held_out if held_out else task.encode
    if folder is None:
        return Encoded.of(make(rows))
    path = owned_folder(Path(folder), "worker.cache") / f"{_fingerprint(task, rows, make.__name__)}.safetensors"
    if not path.is_file():
        Encoded.of(make(rows)).save(path)
    return Encoded.load(path)


class _Sink:
    """A file that keeps nothing of what is written but its digest."""

    closed = False

    def __init__(self, digest: Any):
        self._digest = digest

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def _fingerprint(task: Task, rows: Dataset, what: str) -> str:
    """Of everything that decides the examples: the rows, how they are read and what for, and the tokenizer."""
    digest = hashlib.sha256()
    data, tokenizer = task.config.data, task.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # what calls have set of it, such as where to cut, is no part of what it is
        words = json.dumps(
            {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")},
            sort_keys=True,
        )
    else:
        words = repr((type(tokenizer), sorted(tokenizer.get_vocab().items()), tokenizer.init_kwargs))
    digest.update(
        repr(
            (
                type(task).__name__,
                what,
                _ARRAYS,
                words,
                tokenizer.eos_token_id,
                tokenizer.chat_template,
                data.model_dump(),
                task.data.classes,
                task.data.text,
                task.data.group,
            )
        ).encode()
    )
    # The table that lies behind the rows is mapped from its file, and which of its rows these are is a column of
    # numbers: both are hashed where they are, since gathering the rows would cost each trial the memory that the file
    # is there to save.
    with (
        pa.PythonFile(_Sink(digest), "w") as sink,
        pa.ipc.new_stream(sink, rows.data.table.schema.remove_metadata()) as stream,
    ):
        stream.write_table(rows.data.table.replace_schema_metadata(None))
    if rows._indices is not None:  # by value: what lies behind a buffer's end is anything
        digest.update(rows._indices.column(0).to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _flat(rows: Sequence[Sequence[int]], dtype: type = np.int32) -> tuple[np.ndarray, np.ndarray]:
    """All the rows' numbers one after another, and where each row ends."""
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return np.fromiter(itertools.chain.from_iterable(rows), dtype, int(ends[-1]) if len(rows) else 0), ends
