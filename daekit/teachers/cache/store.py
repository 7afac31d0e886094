"""The files of a cache: facts, output heads, shards, and the manifest that is written last.

::

    DIRECTORY/
      facts.json               whose distributions these are and how they are kept; written first
      heads.safetensors        output heads, where hidden states are kept
      shard-00000.safetensors  keys, bounds and values of some rows
      shard-00000.json         its hash; the shard is committed when this exists
      manifest.json            the facts again, and all shards with their hashes; the cache is whole when this exists
      writer-0.lock            held by the writing process of each rank; shared.lock while it writes one of the other files

Every file is written beside its place and renamed (``daekit.files``): a name stands for whole content at any moment.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from daekit.errors import UserError
from daekit.files import file_hash, write_whole
from daekit.teachers.cache.rows import KEY_BYTES

FORMAT = 1
MANIFEST, FACTS, HEADS = "manifest.json", "facts.json", "heads.safetensors"


@dataclass(frozen=True)
class Shard:
    """A committed shard: ``tokens`` loss positions of ``rows`` rows; ``plan`` is a hash of the keys it should hold."""

    file: str
    hash: str
    bytes: int
    rows: int
    tokens: int
    plan: str


def shard_file(number: int) -> str:
    """The name of a shard."""
    return f"shard-{number:05d}.safetensors"


def write_file(path: Path, content: bytes) -> None:
    """See ``daekit.files.write_whole``.

    Raises:
        UserError: the disk is full, or the directory cannot be written.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = f"the disk is full ({len(content):,} bytes wanted)" if full else str(error.strerror)
        raise UserError(
            f"{path}: cannot be written: {reason}. What is complete is kept: make room, or give the cache another path, and "
            "run again."
        ) from error


def write_facts(path: Path, content: Mapping[str, Any]) -> None:
    """Write one of the JSON files; see ``write_file``."""
    write_file(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The content of one of the JSON files; UserError if it is corrupt."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is corrupt. Delete {path.parent} and write the cache again.")
    return content


def write_shard(directory: Path, number: int, tensors: dict[str, Tensor], plan: str) -> Shard:
    """Write and commit a shard; ``tensors`` hold ``keys [R, 16]`` and ``bounds [R + 1]`` beside the values."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    path = directory / shard_file(number)
    write_file(path, content)
    rows, tokens = len(tensors["keys"]), int(tensors["bounds"][-1])
    shard = Shard(path.name, file_hash(path), len(content), rows, tokens, plan)
    write_facts(path.with_suffix(".json"), asdict(shard))
    return shard


def committed_shard(directory: Path, number: int, plan: str) -> Shard | None:
    """The shard of that number, if it is whole and holds what ``plan`` says."""
    path = directory / shard_file(number)
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return None
    shard = Shard(**read_json(path.with_suffix(".json")))
    return shard if shard.plan == plan and path.stat().st_size == shard.bytes else None


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Wait until no other rank is in here: for the files that belong to no rank."""
    with (directory / "shared.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def writer_lock(directory: Path, rank: int) -> Iterator[None]:
    """Hold the lock of one writing rank; the system releases it when the process ends, however it ends.

    Raises:
        UserError: another process writes; no directory can be made here.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{directory}: no directory can be made here ({error.strerror}); choose another path") from error
    with (directory / f"writer-{rank}.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise UserError(
                f"{directory}: another process writes this cache ({file.read().strip() or 'unknown'}). Wait for it, or give "
                "this one another path."
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


class CacheStore:
    """A whole cache, opened to read: its facts, and where each row lies. Values are mapped, and read when they are asked for.

    Args:
        directory: where ``write_cache`` has written.
        mending: leave out shards that are missing or cut, for ``write_cache`` makes them again.

    Raises:
        UserError: there is no whole cache; a shard is missing or cut.
    """

    def __init__(self, directory: str | Path, mending: bool = False) -> None:
        self.directory = Path(directory)
        if not (self.directory / MANIFEST).is_file():
            begun = (self.directory / FACTS).is_file()
            raise UserError(
                f"{self.directory}: "
                + ("this cache was begun but is not complete" if begun else "there is no cache of a teacher here")
                + ". Write it with `daekit cache RECIPE`, or with daekit.write_cache."
            )
        manifest = read_json(self.directory / MANIFEST)
        self.facts: dict[str, Any] = manifest["facts"]
        if self.facts.get("format") != FORMAT:
            raise UserError(
                f"{self.directory}: is a cache of format {self.facts.get('format')}, and this daekit reads format {FORMAT}; "
                "write it again"
            )
        shards = [Shard(**each) for each in manifest["shards"]]
        self.shards = [shard for shard in shards if not mending or self._size(shard) == shard.bytes]
        self._heads_hash: str | None = manifest["heads"]
        self._open: dict[int, Any] = {}
        self._checked: set[int] = set()
        self.index: dict[bytes, tuple[int, int]] = {}
        self._bounds: list[Tensor] = []
        for number, shard in enumerate(self.shards):
            if (size := self._size(shard)) != shard.bytes:
                raise UserError(
                    f"{self.directory / shard.file}: "
                    + ("is missing" if size is None else f"has {size:,} of {shard.bytes:,} bytes: it was cut or overwritten")
                    + ". Write the cache again: only this shard is computed."
                )
            keys = self._file(number).get_tensor("keys").numpy().tobytes()
            self._bounds.append(self._file(number).get_tensor("bounds"))
            for row in range(shard.rows):
                self.index[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = number, row

    @property
    def tokens(self) -> int:
        """Loss positions of all rows."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def size(self) -> int:
        """Size of all shards and heads on disk."""
        heads = self.directory / HEADS
        return sum(shard.bytes for shard in self.shards) + (heads.stat().st_size if heads.is_file() else 0)

    def heads(self) -> dict[str, Tensor]:
        """The tensors of the output heads."""
        path = self.directory / HEADS
        if not path.is_file() or file_hash(path) != self._heads_hash:
            raise _corrupt(path)
        return load_file(path)

    def row(self, key: bytes) -> RowValues:
        """The values of a row that is there. Its shard's hash is checked when its first row is read."""
        number, row = self.index[key]
        self.check(number)
        start, end = self._bounds[number][row : row + 2].tolist()
        return RowValues(self._file(number), row, start, end)

    def check(self, number: int) -> None:
        """Compare the hash of a shard with the manifest's, once.

        Raises:
            UserError: they differ.
        """
        if number in self._checked:
            return
        path = self.directory / self.shards[number].file
        if file_hash(path) != self.shards[number].hash:
            raise _corrupt(path)
        self._checked.add(number)

    def check_all(self) -> None:
        """Compare the hashes of all shards."""
        for number in range(len(self.shards)):
            self.check(number)

    def _size(self, shard: Shard) -> int | None:
        path = self.directory / shard.file
        return path.stat().st_size if path.is_file() else None

    def _file(self, number: int) -> Any:
        if number not in self._open:
            path = self.directory / self.shards[number].file
            try:
                self._open[number] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise _corrupt(path) from error
        return self._open[number]


@dataclass(frozen=True)
class RowValues:
    """The values of one row of a shard: those of its loss positions are ``start .. end - 1`` of the shard's."""

    file: Any
    row: int
    start: int
    end: int

    def of(self, name: str) -> Tensor:
        """A tensor with one entry per loss position, those of this row."""
        return self.between(name, self.start, self.end)

    def between(self, name: str, start: int, end: int) -> Tensor:
        """Entries ``start .. end - 1`` of a tensor of the shard, read from the disk."""
        found: Tensor = self.file.get_slice(name)[start:end]
        return found

    def entries(self) -> tuple[int, int]:
        """Where the row's entries lie in tensors that have several per loss position."""
        start, end = self.between("entry_bounds", self.row, self.row + 2).tolist()
        return start, end


def require_facts(directory: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Compare the facts of a cache with those that are wanted; facts that either side does not know are not compared.

    Raises:
        UserError: they differ; all differences are named.
    """
    known = [key for key in theirs if theirs[key] is not None and ours.get(key) is not None]
    wrong = [f"{key}: {_short(theirs[key])} there, {_short(ours[key])} wanted" for key in known if theirs[key] != ours[key]]
    if wrong:
        raise UserError(
            f"{directory}: is the cache of something else ({'; '.join(wrong)}). Give this one another path, or delete that one."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _corrupt(path: Path) -> UserError:
    return UserError(
        f"{path}: is not what was written (its hash differs from the manifest's). Delete this file and "
        "write the cache again: only what it held is computed."
    )


def ids_to_bytes(ids: Tensor) -> Tensor:
    """``[..., 3]`` uint8: token ids below 2^24, lowest byte first."""
    ids = ids.to(torch.int32)
    return torch.stack([(ids >> shift) & 255 for shift in (0, 8, 16)], -1).to(torch.uint8)


def bytes_to_ids(packed: Tensor) -> Tensor:
    """int64 token ids of ``ids_to_bytes``."""
    low, middle, high = packed.long().unbind(-1)
    return low | (middle << 8) | (high << 16)
