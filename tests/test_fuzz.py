"""Recipes and suites with something wrong in them: each loads or is one clear error; none hangs or takes all memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.fuzz import CPU_SECONDS, Fuzzer, TookTooLong, within

FEW, MANY, PARTS = 200, 20_000, 4


def test_the_guard_ends_what_takes_too_long() -> None:
    with pytest.raises(TookTooLong), within(0.05):
        while True:
            pass


def test_a_few_hundred_cases(tmp_path: Path) -> None:
    fuzzer = Fuzzer(tmp_path)
    outcomes = [fuzzer.run(seed) for seed in range(FEW)]
    assert {"loaded", "refused"} == set(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_twenty_thousand_cases(part: int, tmp_path: Path) -> None:
    """Under a limit of memory, which a process sets for itself."""
    count = MANY // PARTS
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.fuzz", str(part * count), str(count), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=count * CPU_SECONDS,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.endswith(" 0 failed\n")
