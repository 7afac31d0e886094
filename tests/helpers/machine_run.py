"""One rank of a run on two machines, which lingers in a step: ``machine_run.py RECIPE STEP SECONDS [OVERRIDE...]``."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from daekit.cli import main
from tests.helpers.run_world import during_step

if __name__ == "__main__":
    recipe, step, seconds, *overrides = sys.argv[1:]

    def linger() -> None:
        """Say that the step is reached, and by which process; then wait for what the test does."""
        Path(recipe).with_name(f"reached-{os.environ['RANK']}").write_text(str(os.getpid()))
        time.sleep(float(seconds))

    during_step(int(step), linger)
    sys.exit(main(["train", recipe, *overrides]))
