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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
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


def begin(directory: Path, facts: Mapping[str, Any], heads: bytes) -> tuple[dict[str, Any], str | None]:
    """Write the facts and the output heads of a cache, or compare the facts with those that are there.

    Returns:
        The facts that are there, and the hash of the heads; None where there are none.
    """
    with _alone(directory):
        if (directory / FACTS).is_file():
            require_facts(directory, _read_json(directory / FACTS), facts)
        else:
            _write_json(directory / FACTS, facts)
        path = directory / HEADS
        if heads and not (path.is_file() and path.read_bytes() == heads):
            _write(path, heads)
        return _read_json(directory / FACTS), file_hash(path) if heads else None


def finish(directory: Path, facts: Mapping[str, Any], heads_hash: str | None, shards: Iterable[Shard]) -> None:
    """Write the manifest, then remove what belongs to no shard of it."""
    shards = sorted(shards, key=lambda shard: shard.file)
    made_by = {name: version(name) for name in ("daekit", "torch", "transformers")}
    content = {"facts": facts, "heads": heads_hash, "shards": [asdict(shard) for shard in shards], "versions": made_by}
    with _alone(directory):
        _write_json(directory / MANIFEST, content)
        known = {name for shard in shards for name in (shard.file, shard.file.replace(".safetensors", ".json"))}
        for path in directory.glob("shard-*"):
            if path.name not in known:
                path.unlink()


def write_shard(directory: Path, number: int, tensors: dict[str, Tensor], plan: str) -> None:
    """Write and commit a shard; ``tensors`` hold ``keys [R, 16]`` and ``bounds [R + 1]`` beside the values."""
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    path = _shard_path(directory, number)
    _write(path, content)
    rows, tokens = len(tensors["keys"]), int(tensors["bounds"][-1])
    _write_json(path.with_suffix(".json"), asdict(Shard(path.name, file_hash(path), len(content), rows, tokens, plan)))


def committed_shard(directory: Path, number: int, plan: str) -> Shard | None:
    """The shard of that number, if it is whole and holds what ``plan`` says."""
    path = _shard_path(directory, number)
    if not path.with_suffix(".json").is_file() or not path.is_file():
        return None
    shard = Shard(**_read_json(path.with_suffix(".json")))
    return shard if shard.plan == plan and path.stat().st_size == shard.bytes else None


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"


def _write(path: Path, content: bytes) -> None:
    """See ``daekit.files.write_whole``; UserError where the disk is full, or the directory cannot be written."""
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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def _read_json(path: Path) -> dict[str, Any]:
    """The content of one of the JSON files; UserError if it is corrupt."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is corrupt. Delete {path.parent} and write the cache again.")
    return content


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Wait until no other rank is in here: for the files that belong to no rank."""
    with (directory / "shared.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def writer_lock(directory: Path, rank: int) -> Iterator[None]:
    """Hold the lock of one writing rank, which ends with its process; UserError where another process holds it."""
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
        manifest = _read_json(self.directory / MANIFEST)
        self.facts: dict[str, Any] = manifest["facts"]
        if self.facts.get("format") != FORMAT:
            raise UserError(
                f"{self.directory}: is a cache of format {self.facts.get('format')}, and this daekit reads format {FORMAT}; "
                "write it again"
            )
        self._heads_hash: str | None = manifest["heads"]
        self.shards: list[Shard] = []
        self.index: dict[bytes, tuple[int, int]] = {}  # key of a row -> its shard, and which row of that it is
        self._files: list[tuple[Any, Tensor]] = []  # of each shard, and the bounds of its rows
        self._checked: set[int] = set()
        for shard in (Shard(**each) for each in manifest["shards"]):
            path = self.directory / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size == shard.bytes:
                self._add(shard, path)
            elif not mending:
                raise UserError(
                    f"{path}: "
                    + ("is missing" if size is None else f"has {size:,} of {shard.bytes:,} bytes: it was cut or overwritten")
                    + ". Write the cache again: only this shard is computed."
                )

    def _add(self, shard: Shard, path: Path) -> None:
        try:
            file = safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise _corrupt(path) from error
        keys = file.get_tensor("keys").numpy().tobytes()
        for row in range(shard.rows):
            self.index[keys[row * KEY_BYTES : (row + 1) * KEY_BYTES]] = len(self.shards), row
        self.shards.append(shard)
        self._files.append((file, file.get_tensor("bounds")))

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

    def values(self, keys: Iterable[bytes], name: str) -> Tensor:
        """What a tensor holds of some rows that are there, one after another, read from the disk.

        The hash of a shard is checked when its first row is read.
        """
        return torch.cat([self._values(*self.index[key], name) for key in keys])

    def _values(self, number: int, row: int, name: str) -> Tensor:
        self._check(number)
        file, bounds = self._files[number]
        if name in ("entry_ids", "entry_counts"):  # several per loss position
            bounds = file.get_slice("entry_bounds")
        start, end = bounds[row : row + 2].tolist()
        found: Tensor = file.get_slice(name)[start:end]
        return found

    def check_all(self) -> None:
        """Compare the hashes of all shards with the manifest's, each once; UserError where they differ."""
        for number in range(len(self.shards)):
            self._check(number)

    def _check(self, number: int) -> None:
        path = self.directory / self.shards[number].file
        if number not in self._checked and file_hash(path) != self.shards[number].hash:
            raise _corrupt(path)
        self._checked.add(number)


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
