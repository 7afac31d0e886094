"""Where real data and models of tests lie: beside the repository, or in DAEKIT_SHARED, DAEKIT_MODELS; else tests skip."""

from __future__ import annotations

import os
from pathlib import Path

_BESIDE = Path(__file__).resolve().parents[3]
DATA = Path(os.environ.get("DAEKIT_SHARED", _BESIDE / "shared")) / "data"
MODELS = Path(os.environ.get("DAEKIT_MODELS", _BESIDE / "models"))
