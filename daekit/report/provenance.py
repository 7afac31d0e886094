"""The code that measured: versions of packages and the commit of daekit's source."""

from __future__ import annotations

import importlib.metadata
import subprocess
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("daekit", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Package -> installed version."""
    return {package: importlib.metadata.version(package) for package in packages}


def commit() -> str:
    """The commit of daekit's source, with a mark if it has been changed since; "unknown" outside a checkout."""
    source = Path(__file__).parent.parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=source, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return "unknown"
    ours = (source.parent / ".git").exists()  # not a repository around the virtual environment
    return described.stdout.strip() if ours and described.stdout.strip() else "unknown"
