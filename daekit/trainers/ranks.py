"""What keeps a run the same on another number of ranks.

A step trains on its global batch: ``ranks x per_device_train_batch_size x gradient_accumulation_steps`` rows in the order of
the epoch, of which micro-batch m of rank r holds rows ``(m * ranks + r) * per_device_train_batch_size`` and on. On another
number of ranks the same rows make the same steps as long as that product stays. What a checkpoint holds per rank are sums,
which are added up, and responses that wait, each at its place in the global batch. The state of the random numbers of dropout
cannot be kept.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import set_seed

from daekit.data.collator import FOR_TEACHER, without_loss
from daekit.errors import UserError

logger = logging.getLogger(__name__)

_STATES = "daekit_state_{}.json"  # what a rank has summed and not logged yet


def states_file(folder: Path, rank: int) -> Path:
    """Where a checkpoint keeps what one rank has summed."""
    return folder / _STATES.format(rank)


def ranks_of(folder: Path) -> int:
    """How many ranks have written a checkpoint."""
    return len(list(folder.glob(_STATES.format("*"))))


def global_batch(args: Any) -> int:
    """Rows of a step."""
    return int(args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size)


def order_facts(trainer: Any) -> dict[str, Any]:
    """What decides, beside the seed, which rows make which step; None where it is as usual."""
    args, rows = trainer.args, trainer.train_dataset
    micro = args.per_device_train_batch_size
    seen = {
        "group_by_length": [micro * args.gradient_accumulation_steps],
        "batch_rebalance": [micro, args.gradient_accumulation_steps, args.world_size],
    }
    strategy = args.train_sampling_strategy
    sized = args.dataloader_drop_last and isinstance(rows, Dataset)
    return {
        "batch": global_batch(args),
        "sampling": None if strategy == "random" else [strategy, *seen.get(strategy, [])],
        "rows dropped per epoch": len(rows) % (micro * args.world_size) if sized else None,
        # the balancing loss is a mean over micro-batches
        "per_device_train_batch_size": micro if trainer.aux_loss_enabled else None,
    }


def keep_global_batch(trainer: Any, folder: Path, rows: int) -> None:
    """Let the ranks of now take steps of ``rows`` rows, as the ranks that wrote ``folder`` did, and say how.

    Micro-batches become no larger than the arguments say.

    Raises:
        UserError: the ranks cannot share so many rows evenly, or DeepSpeed's files cannot be read by so many.
    """
    args, before = trainer.args, ranks_of(folder)
    if before == args.world_size:
        return
    if trainer.is_deepspeed_enabled:
        raise UserError(
            f"{folder}: was saved by {before} ranks, and DeepSpeed's optimizer states cannot be read by {args.world_size}. "
            f"Launch {before} ranks (--num_processes {before}), or begin a run with its weights as student."
        )
    share, rest = divmod(rows, args.world_size)
    if rest:
        raise UserError(
            f"{folder}: a step of this run trains on {rows} rows, which {args.world_size} ranks cannot share evenly. Launch a "
            f"number of ranks that divides {rows} (it was saved by {before})."
        )
    micro = next(size for size in range(min(args.per_device_train_batch_size, share), 0, -1) if share % size == 0)
    args.per_device_train_batch_size, args.gradient_accumulation_steps = micro, share // micro
    trainer._train_batch_size = args.train_batch_size
    if args.process_index == 0:
        logger.warning(
            "%s was saved by %d rank(s); on %d a step trains on the same %d rows with per_device_train_batch_size=%d, "
            "gradient_accumulation_steps=%d. Dropout, if there is any, draws other numbers.",
            folder.name, before, args.world_size, rows, micro, share // micro,
        )  # fmt: skip


def restart_random_numbers(args: Any, step: int) -> None:
    """Begin random states that depend on the seed, the step and the rank, where those of a checkpoint are of other ranks."""
    set_seed(int(np.random.SeedSequence([args.seed, step, args.process_index]).generate_state(1)[0]))


def read_states(folder: Path, rank: int, ranks: int) -> dict[str, Any]:
    """What rank ``rank`` of ``ranks`` goes on from: its own file, or its part of the files of another number of ranks."""
    before = ranks_of(folder)
    if before == ranks:
        state: dict[str, Any] = json.loads(states_file(folder, rank).read_text())
        return state
    states = [json.loads(states_file(folder, each).read_text()) for each in range(before)]
    mine = states[0] | {"tr_loss": sum(each["tr_loss"] for each in states) / before}  # a mean over ranks when it is logged
    mine |= {"means": _added(states, rank), "new_tokens": 0 if rank else sum(each["new_tokens"] for each in states)}
    if written := [each["rollouts"] for each in states if each["rollouts"]]:
        responses = [response for each in written for response in each["responses"]]
        mine["rollouts"] = {"until": written[0]["until"], "responses": responses, "means": _added(written, rank)}
    return mine


def _added(states: list[dict[str, Any]], rank: int) -> dict[str, list[float]]:
    """The sums and counts of all, for the first rank: they are added up over ranks when they are logged."""
    total: dict[str, list[float]] = {}
    for state in states if rank == 0 else ():
        for key, pair in state["means"].items():
            total[key] = [a + b for a, b in zip(total.get(key, [0.0, 0.0]), pair, strict=True)]
    return total


def drawn(trainer: Any, epoch: Iterator[Any], count: int) -> list[Any]:
    """The next ``count`` micro-batches of an epoch, fewer at its end.

    accelerate fills the last micro-batch of all ranks with rows from the beginning of the epoch. They carry no loss, or on
    several ranks some rows would count twice.
    """
    args, rows, batches = trainer.args, trainer.train_dataset, []
    micro = args.per_device_train_batch_size
    left = len(rows) % (micro * args.world_size) if isinstance(rows, Dataset) else 0
    fills = args.world_size > 1 and not args.dataloader_drop_last and args.train_sampling_strategy != "batch_rebalance"
    for batch in islice(epoch, count):
        if left and fills and trainer.accelerator.gradient_state.end_of_dataloader:  # it forgets this once it is exhausted
            for view in (batch, batch.get(FOR_TEACHER)):
                if view is not None:
                    without_loss(view, own=left - args.process_index * micro)
        batches.append(batch)
    return batches
