"""The code that measured: versions of packages and the commit of daekit's source."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

PACKAGES = ("daekit", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str:
    """The commit of daekit's source, with a mark if it has been changed since; "unknown" outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # a repository around the virtual environment says nothing
        return "unknown"
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    except FileNotFoundError:
        return "unknown"
