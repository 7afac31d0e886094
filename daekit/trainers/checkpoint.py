"""Whole checkpoints only: a manifest written last says which files belong to a checkpoint and which run it is of.

transformers' Trainer resumes from the newest folder, whole or not, loads what it finds with ``strict=False`` and goes on
without an optimizer if there is none. Here a checkpoint without a valid manifest does not exist, an older one is removed
only after the newer one is whole, and a run that is not the same run is refused.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.files import file_hash, write_json

MANIFEST = "daekit_checkpoint.json"
_UNFINISHED = MANIFEST + ".tmp"  # lies in a folder from the first moment of a save; its renaming ends the save
_REMOVED = ".removed"
_FOLDER = re.compile(r"^checkpoint-(\d+)$")


def begin(folder: Path) -> None:
    """Start a save: until ``seal`` the folder counts as the remains of a save that did not end."""
    if folder.exists():
        _remove(folder)  # of an earlier run; a mixture of both could be neither resumed nor told from a damaged one
    folder.mkdir(parents=True)
    (folder / _UNFINISHED).touch()


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Declare a checkpoint whole: list its files with sizes and hashes, and the run it belongs to."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, _digest(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _UNFINISHED
    }
    write_json(folder / MANIFEST, {"files": files, "run": run, "time": time.time()})


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    if unsealed(folder):
        return f"{MANIFEST} is missing: the run was stopped while it was being written, or it is not a checkpoint of daekit"
    manifest = _manifest(folder)
    if manifest is None:
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in manifest["files"].items():
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
    sealed = _sealed(output_dir)
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
    before = (_manifest(folder) or {"run": {}})["run"]
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


def clear_remains(output_dir: Path) -> None:
    """Delete the remains of saves and of deletions that did not end.

    Raises:
        UserError: a checkpoint that was not written by daekit: it is nobody's here to delete or to number on from.
    """
    for grave in output_dir.glob(f"checkpoint-*{_REMOVED}"):
        shutil.rmtree(grave)
    for folder in filter(unsealed, checkpoints(output_dir)):
        if not (folder / _UNFINISHED).is_file() and any(folder.iterdir()):
            raise UserError(f"{folder}: was not written by daekit; train into another output_dir, or move it away")
        _remove(folder)


def rotate(output_dir: Path, keep: int | None, protected: set[Path]) -> None:
    """Delete the oldest whole checkpoints beyond ``keep``, none of ``protected`` (the one just written, the best so far)."""
    if not keep:
        return
    sealed = _sealed(output_dir)
    spared = {folder.resolve() for folder in protected}
    removable = [folder for folder in sealed if folder.resolve() not in spared]
    for folder in removable[: max(len(sealed) - keep, 0)]:
        _remove(folder)


def _sealed(output_dir: Path) -> list[Path]:
    """Sealed checkpoints in the order of their writing, which is not that of their steps if a run was begun anew."""
    times = {
        folder: (_manifest(folder) or {"time": float("inf")})["time"]
        for folder in checkpoints(output_dir)
        if not unsealed(folder)
    }
    return sorted(times, key=times.__getitem__)


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The content of a manifest, None if it cannot be understood."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return None
    return content if isinstance(content, dict) and {"files", "run", "time"} <= content.keys() else None


def _remove(folder: Path) -> None:
    """Delete a folder; from the first moment on it is no checkpoint, even if the deletion is cut short."""
    grave = folder.with_name(folder.name + _REMOVED)
    if grave.exists():
        shutil.rmtree(grave)
    shutil.rmtree(folder.rename(grave))


def _digest(path: Path) -> str:
    return file_hash(path, sync=True)  # a seal on what a power cut can still take away would be worth nothing


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
