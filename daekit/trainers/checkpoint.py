"""Committed checkpoints only: a manifest written last says which files belong to a checkpoint and which run it is of.

transformers' Trainer resumes from the newest folder, whole or not, loads what it finds with ``strict=False`` and goes on
without an optimizer if there is none. Here a checkpoint without a valid manifest does not exist, an older one is removed
only after the newer one is committed, and a run that is not the same run is refused.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.files import file_hash, write_json

MANIFEST = "daekit_checkpoint.json"
_PARTIAL = MANIFEST + ".tmp"  # lies in a folder from the first moment of a save; its renaming ends the save
_TRASH = ".removed"
_FOLDER = re.compile(r"^checkpoint-\d+$")


def begin(folder: Path) -> None:
    """Start a save: until ``commit`` the folder is a partial checkpoint, which is never resumed."""
    if folder.exists():
        _remove(folder)  # of an earlier run; a mixture of both could be neither resumed nor told from a corrupt one
    folder.mkdir(parents=True)
    (folder / _PARTIAL).touch()


def commit(folder: Path, run: dict[str, Any], start: int) -> None:
    """Declare a checkpoint whole: list its files with sizes and hashes, the facts of its run, and its start (``start_of``)."""
    files = {  # synced: a manifest of what a power cut can still take away would be worth nothing
        str(path.relative_to(folder)): [path.stat().st_size, file_hash(path, sync=True)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != _PARTIAL
    }
    write_json(folder / MANIFEST, {"files": files, "run": run, "start": start})


def corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is whole."""
    if not is_committed(folder):
        return f"{MANIFEST} is missing: the run was stopped while it was being written, or it is not a checkpoint of daekit"
    manifest = _manifest(folder)
    if not manifest:
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
        if file_hash(path, sync=True) != digest:
            return f"the content of {name} has changed"
    return None


def checkpoints(output_dir: Path) -> list[Path]:
    """All checkpoint folders, whole or not, the oldest step first."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if _FOLDER.match(path.name)), key=_step)


def is_committed(folder: Path) -> bool:
    """Whether the save of a checkpoint has ended; it may be corrupt now."""
    return (folder / MANIFEST).is_file()


def newest(output_dir: Path) -> Path | None:
    """The newest checkpoint to resume from, None if there is none; partial ones are ignored (a later save removes them).

    Raises:
        UserError: the newest committed checkpoint is corrupt: going on from an older one would lose work without a word.
    """
    found = _committed(output_dir)[-1:]
    if found and (problem := corruption(found[0])):
        raise UserError(
            f"{found[0]}: the checkpoint is corrupt: {problem}. Delete this folder to go on from the checkpoint before it."
        )
    return found[0] if found else None


def start_of(resumed: Path | None, output_dir: Path) -> int:
    """Number of the start that a training belongs to: each one that begins anew in ``output_dir`` gets the next number.

    Checkpoints are ordered by it and by their step, never by a clock, which may jump.
    """
    if resumed is not None and resumed.resolve().parent == output_dir.resolve():
        return int(_manifest(resumed)["start"])
    return 1 + max((_manifest(folder).get("start", 0) for folder in checkpoints(output_dir) if is_committed(folder)), default=0)


def facts_of(folder: Path) -> dict[str, Any]:
    """The facts of the run that a whole checkpoint belongs to."""
    facts: dict[str, Any] = _manifest(folder)["run"]
    return facts


def require_same_run(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to resume a checkpoint of another run: say which facts differ."""
    before = facts_of(folder)
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


def clear_partial(output_dir: Path) -> None:
    """Delete what saves and deletions that did not end have left.

    Raises:
        UserError: a checkpoint without a manifest that is not such a rest: daekit did not write it, or it was tampered with.
    """
    for trash in output_dir.glob(f"checkpoint-*{_TRASH}"):
        shutil.rmtree(trash)
    for folder in checkpoints(output_dir):
        if is_committed(folder):
            continue
        if not (folder / _PARTIAL).is_file() and any(folder.iterdir()):
            raise UserError(
                f"{folder}: has no {MANIFEST}, so it cannot be told whether it is whole: it was not written by daekit, or that "
                "file was lost. Delete the folder to train without it, move it away, or train into another output_dir."
            )
        _remove(folder)


def rotate(output_dir: Path, keep: int | None, protected: set[Path]) -> None:
    """Delete the oldest committed checkpoints beyond ``keep``, none of ``protected`` (the one just written, the best one)."""
    if not keep:
        return
    committed, spared = _committed(output_dir), {folder.resolve() for folder in protected}
    removable = [folder for folder in committed if folder.resolve() not in spared]
    for folder in removable[: max(len(committed) - keep, 0)]:
        _remove(folder)


def _committed(output_dir: Path) -> list[Path]:
    """Committed checkpoints, the oldest first: by the start that they belong to, then by step.

    One whose manifest cannot be read counts as of the last start, so that it is not stepped over.
    """
    folders = [folder for folder in checkpoints(output_dir) if is_committed(folder)]
    return sorted(folders, key=lambda folder: (_manifest(folder).get("start", 1 << 62), _step(folder)))


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def _manifest(folder: Path) -> dict[str, Any]:
    """The content of a manifest, empty if it cannot be understood."""
    try:
        content = json.loads((folder / MANIFEST).read_text())
    except ValueError:
        return {}
    return content if isinstance(content, dict) and {"files", "run", "start"} <= content.keys() else {}


def _remove(folder: Path) -> None:
    """Delete a folder; from the first moment on it is no checkpoint, even if the deletion is cut short."""
    trash = folder.with_name(folder.name + _TRASH)
    if trash.exists():
        shutil.rmtree(trash)
    shutil.rmtree(folder.rename(trash))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
