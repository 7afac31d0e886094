"""Writes a cache in a process of its own, for tests that kill it or start several: ``DIRECTORY [slow]``; ranks by torchrun."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from daekit.teachers import write_cache
from daekit.teachers.cache import write as writing
from tests.helpers import tiny
from tests.helpers.cache_cases import long_rows, model_teacher

ROWS = 60
SHARD_BYTES = 20_000


def main() -> None:
    directory, slow = Path(sys.argv[1]), "slow" in sys.argv[2:]
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    real = writing._Writer._values

    def values(self: writing._Writer, rows: list[writing.CacheRow]) -> object:
        print(f"computes {len(rows)}", flush=True)
        if slow:
            time.sleep(0.02)
        return real(self, rows)

    writing._Writer._values = values  # type: ignore[method-assign, assignment]
    print("begins", flush=True)
    write_cache(model_teacher(), long_rows(ROWS), directory, tokenizer=tiny.tokenizer(), shard_bytes=SHARD_BYTES)
    if dist.is_initialized():
        dist.barrier()
    print("whole", flush=True)


if __name__ == "__main__":
    main()
