"""Whole checkpoints only: a manifest written last says which files belong to a checkpoint and which run it is of.

transformers' Trainer resumes from the newest folder, whole or not, loads what it finds with ``strict=False`` and goes on
without an optimizer if there is none. Here a checkpoint without a valid manifest does not exist, an older one is removed
only after the newer one is whole, and a run that is not the same run is refused.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import xxhash

from daekit.errors import UserError

MANIFEST = "daekit_checkpoint.json"
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_BLOCK = 1 << 22


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that after a crash it is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump(content, stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Declare a checkpoint whole: list its files with sizes and hashes, and the run it belongs to."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, _digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files, "run": run})


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing: the run was stopped while it was being written"
    for name, (size, digest) in json.loads(manifest.read_text())["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if _digest(path) != digest:
            return f"the content of {name} has changed"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, whole or not, the oldest step first."""
    found = [(int(m.group(1)), path) for path in output_dir.glob("checkpoint-*") if (m := _FOLDER.match(path.name))]
    return [path for _, path in sorted(found)]


def unsealed(folder: Path) -> bool:
    """Whether the folder is the rest of a save that did not end (as opposed to a damaged whole checkpoint)."""
    return not (folder / MANIFEST).is_file()


def newest_whole(output_dir: Path) -> Path | None:
    """The newest checkpoint to resume from; None if there is none.

    Folders whose save did not end are ignored (a later save removes them).

    Raises:
        UserError: the newest sealed checkpoint is damaged: going on from an older one would lose work without a word.
    """
    sealed = [folder for folder in checkpoints(output_dir) if not unsealed(folder)]
    if not sealed:
        return None
    problem = damage(sealed[-1])
    if problem:
        raise UserError(
            f"{sealed[-1]}: the checkpoint is damaged: {problem}. Delete this folder to go on from the checkpoint before it."
        )
    return sealed[-1]


def require_same_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to resume a checkpoint of another run: say which facts differ."""
    before = json.loads((folder / MANIFEST).read_text())["run"]
    now = json.loads(json.dumps(run))
    different = [
        f"{key}: {_short(before.get(key))} then, {_short(now.get(key))} now"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]
    if different:
        raise UserError(
            f"{folder}: this checkpoint belongs to another run ({'; '.join(different)}). "
            "Resume with what it was begun with, or train into another output_dir."
        )


def remove_unsealed(output_dir: Path) -> None:
    """Delete the remains of saves that did not end."""
    for folder in checkpoints(output_dir):
        if unsealed(folder):
            shutil.rmtree(folder)


def rotate(output_dir: Path, keep: int | None, protect: str | None) -> None:
    """Delete the oldest whole checkpoints beyond ``keep``, never the newest nor ``protect`` (the best so far)."""
    if not keep:
        return
    sealed = [folder for folder in checkpoints(output_dir) if not unsealed(folder)]
    spared = {sealed[-1].resolve()} | ({Path(protect).resolve()} if protect else set())
    removable = [folder for folder in sealed if folder.resolve() not in spared]
    for folder in removable[: max(len(sealed) - keep, 0)]:
        (folder / MANIFEST).unlink()  # from here on it does not exist, even if the rest of the deletion is cut short
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
