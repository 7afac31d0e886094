"""Where the real data of tests lie: beside the repository, or in DAEKIT_SHARED; tests skip what is not there."""

from __future__ import annotations

import os
from pathlib import Path

DATA = Path(os.environ.get("DAEKIT_SHARED", Path(__file__).resolve().parents[3] / "shared")) / "data"
