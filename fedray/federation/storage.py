"""Checkpoints in another place beside the run directory: wherever pyarrow or fsspec reaches (`s3://`, `gs://`, `hdfs://`,
`abfs://`, a mounted `file://`), as Ray's own storage paths.

A checkpoint there is complete when its file `complete` is, which is written last. A run whose directory is gone goes on
from the newest one that is complete.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fedray.errors import ConfigError, RoundError

if TYPE_CHECKING:
    from pyarrow import fs

T = TypeVar("T")

COMPLETE, CONFIG = "complete", "config.yaml"
#: A network has so many chances, each after twice the pause of the last.
ATTEMPTS, PAUSE = 4, 1.0


class Storage:
    """A folder at a URI. Raises ConfigError for one that nothing here can reach."""

    def __init__(self, uri: str):
        self.uri = uri
        self._files, self._folder = _open(uri)

    def rounds(self) -> list[str]:
        """The names of the complete checkpoints, the oldest first. Raises RoundError where they cannot be listed."""
        with self._speaking("listed in"):
            found = self._listed(self._folder)
            names = [Path(info.path).name for info in found if info.path.rsplit("/", 1)[-1].startswith("round-")]
            return sorted(name for name in names if self._is_file(f"{name}/{COMPLETE}"))

    def save(self, folder: Path, keep: Collection[str]) -> None:
        """A checkpoint's folder, by its name, and no others than `keep`. Raises RoundError where it cannot be
        written."""
        from pyarrow import fs

        place = f"{self._folder}/{folder.name}"
        with self._speaking("written to"):
            if self._listed(place):  # of a kill before it was complete, or of a round that is repeated
                _retried(lambda: self._files.delete_dir(place))
            _retried(lambda: self._files.create_dir(place, recursive=True))
            _retried(lambda: fs.copy_files(str(folder), place, fs.LocalFileSystem(), self._files))
            self._write(f"{folder.name}/{COMPLETE}", b"")
            for name in self.rounds():
                if name not in keep:
                    _retried(partial(self._files.delete_dir, f"{self._folder}/{name}"))

    def fetch(self, folder: Path) -> None:
        """Every complete checkpoint that a folder lacks, where the newest of them is newer than all that it has."""
        here = {path.name for path in folder.glob("round-*")}
        names = self.rounds()
        if names and names[-1] > max(here, default=""):
            for name in names:
                if name not in here:
                    self._fetch(name, folder)

    def _fetch(self, name: str, folder: Path) -> None:
        from pyarrow import fs

        part = folder / f".fetching-{name}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        place = f"{self._folder}/{name}"
        with self._speaking("read from"):
            _retried(lambda: fs.copy_files(place, str(part), self._files, fs.LocalFileSystem()))
        (part / COMPLETE).unlink()
        part.rename(folder / name)

    def config(self) -> str | None:
        """The config of the run whose checkpoints these are."""
        with self._speaking("read from"):
            if not self._is_file(CONFIG):
                return None
            return _retried(self._read_config)

    def _read_config(self) -> str:
        with self._files.open_input_stream(f"{self._folder}/{CONFIG}") as file:
            return bytes(file.read()).decode()

    def claim(self, config: str) -> None:
        """The checkpoints to come are those of this config."""
        with self._speaking("written to"):
            _retried(lambda: self._files.create_dir(self._folder, recursive=True))
            self._write(CONFIG, config.encode())

    def _write(self, name: str, content: bytes) -> None:
        def write() -> None:
            with self._files.open_output_stream(f"{self._folder}/{name}") as file:
                file.write(content)

        _retried(write)

    def _listed(self, folder: str) -> list[Any]:
        from pyarrow import fs

        return _retried(lambda: list(self._files.get_file_info(fs.FileSelector(folder, allow_not_found=True))))

    def _is_file(self, name: str) -> bool:
        return _retried(lambda: bool(self._files.get_file_info(f"{self._folder}/{name}").is_file))

    @contextmanager
    def _speaking(self, what: str) -> Iterator[None]:
        """An error as a person reads it."""
        try:
            yield
        except Exception as error:  # every backend of fsspec has errors of its own
            raise RoundError(
                f"the checkpoints could not be {what} output.checkpoints {self.uri} ({error}): those in the run "
                "directory are whole; go on with output.resume"
            ) from error


def _open(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for a URI, or fsspec's in its clothes; and the path in it."""
    from pyarrow import ArrowException, fs

    if "://" not in uri:
        raise ConfigError(
            f"output.checkpoints '{uri}' is no URI: give one such as s3://bucket/folder, or file:///folder"
        )
    try:
        return fs.FileSystem.from_uri(uri)
    except (ArrowException, OSError) as unknown:
        import fsspec

        try:
            files, path = fsspec.core.url_to_fs(uri)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(
                f"output.checkpoints '{uri}' cannot be reached ({error}): give a URI that pyarrow or fsspec knows, "
                "such as s3://bucket/folder"
            ) from unknown
        return fs.PyFileSystem(fs.FSSpecHandler(files)), path


def _retried(work: Callable[[], T]) -> T:
    """What the work gives, at the latest at the last attempt. Raises what that one raises."""
    pause = PAUSE
    for _ in range(ATTEMPTS - 1):
        try:
            return work()
        except Exception:  # noqa: BLE001 - as in `_speaking`; the last attempt raises it
            time.sleep(pause)
            pause *= 2
    return work()


def storage_of(uri: str | None) -> Storage | None:
    """The storage, where one is asked for."""
    return Storage(uri) if uri is not None else None
