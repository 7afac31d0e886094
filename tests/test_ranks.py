"""What a change of the number of ranks does to a training, without any ranks: batches, sums, random numbers, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from daekit.data.collator import EXAMPLES
from daekit.errors import UserError
from daekit.trainers import ranks
from daekit.trainers.distributed import require_distribution
from tests.helpers import tiny
from tests.helpers.trainer_world import kd, sft


def trainer(world: int, micro: int = 2, accumulation: int = 2, rank: int = 0, **more: Any) -> Any:
    """What is asked of a trainer."""
    args = SimpleNamespace(
        per_device_train_batch_size=micro,
        train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        world_size=world,
        process_index=rank,
        seed=3,
        dataloader_drop_last=False,
        train_sampling_strategy="random",
    )
    return SimpleNamespace(args=args, is_deepspeed_enabled=False, aux_loss_enabled=False, train_dataset=tiny.rows(14), **more)


def checkpoint(folder: Path, *states: dict[str, Any]) -> Path:
    """A checkpoint of so many ranks."""
    for rank, state in enumerate(states):
        ranks.states_file(folder, rank).write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(("world", "micro", "accumulation"), [(1, 8, 3), (3, 8, 1), (4, 6, 1), (6, 4, 1), (12, 2, 1)])
def test_the_global_batch_is_kept_by_micro_batches_that_are_no_larger(
    world: int, micro: int, accumulation: int, tmp_path: Path
) -> None:
    given = trainer(world, micro=8, accumulation=5)
    ranks.keep_global_batch(given, checkpoint(tmp_path, {}, {}), 24)
    assert (given.args.per_device_train_batch_size, given.args.gradient_accumulation_steps) == (micro, accumulation)
    assert ranks.global_batch(given.args) == 24


def test_on_as_many_ranks_the_arguments_stay_and_another_batch_is_another_run(tmp_path: Path) -> None:
    given = trainer(2, micro=8, accumulation=5)
    ranks.keep_global_batch(given, checkpoint(tmp_path, {}, {}), 24)
    assert ranks.order_facts(given)["batch"] == 80


def test_ranks_that_cannot_share_a_step_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"trains on 8 rows, which 3 ranks cannot share evenly. Launch a number .* divides 8"):
        ranks.keep_global_batch(trainer(3), checkpoint(tmp_path, {}, {}), 8)


def test_deepspeed_on_other_ranks_is_refused_with_what_to_launch(tmp_path: Path) -> None:
    given = trainer(4)
    given.is_deepspeed_enabled = True
    with pytest.raises(UserError, match=r"was saved by 2 ranks, and DeepSpeed's .* by 4. Launch 2 ranks .*as student"):
        ranks.keep_global_batch(given, checkpoint(tmp_path, {}, {}), 8)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "sampling"),
        ({"dataloader_drop_last": True}, "rows dropped per epoch"),
    ],
)
def test_where_the_rows_of_a_step_depend_on_the_ranks_other_ranks_are_another_run(changes: dict[str, Any], key: str) -> None:
    def facts(world: int, micro: int, accumulation: int) -> Any:
        given = trainer(world, micro, accumulation)
        vars(given.args).update(changes)
        return ranks.order_facts(given)

    assert facts(2, 4, 1)[key] != facts(1, 4, 2)[key]
    assert facts(2, 4, 1)["batch"] == facts(1, 4, 2)["batch"]
    usual = ranks.order_facts(trainer(2))
    assert usual == {"batch": 8, "sampling": None, "rows dropped per epoch": None, "per_device_train_batch_size": None}


def state(loss: float, tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "means": {"ce": [loss * tokens, tokens]},
        "new_tokens": tokens,
        "tr_loss": loss,
        "total": 7,
        "rollouts": None,
        **more,
    }


def test_the_sums_of_all_ranks_go_to_the_first_and_none_is_lost(tmp_path: Path) -> None:
    responses = [[[4, place, [place]]] for place in (0, 2)]
    written = [{"until": 5, "responses": each, "means": {"rollout_length": [1.0, 1.0]}} for each in responses]
    before = [state(2.0, 10, rollouts=written[0]), state(4.0, 30, rollouts=written[1])]
    folder = checkpoint(tmp_path, *before)
    assert [ranks.read_states(folder, rank, 2) for rank in (0, 1)] == before
    now = [ranks.read_states(folder, rank, 4) for rank in range(4)]
    assert [each["means"] for each in now] == [{"ce": [140.0, 40.0]}, {}, {}, {}]
    assert [each["new_tokens"] for each in now] == [40, 0, 0, 0]
    assert all(each["tr_loss"] == 3.0 and each["total"] == 7 for each in now)
    assert all(each["rollouts"]["responses"] == responses[0] + responses[1] for each in now)
    assert now[0]["rollouts"]["means"] == {"rollout_length": [2.0, 2.0]} and now[1]["rollouts"]["means"] == {}


def test_a_rank_takes_the_responses_of_its_own_places(tmp_path: Path) -> None:
    rollouts = kd(tmp_path, tiny.rows(8), on_policy_fraction=0.5, max_new_tokens=4, per_device_train_batch_size=2).rollouts
    rollouts.trainer.args = trainer(2, rank=1).args
    rollouts.load({"until": 3, "responses": [[2, place, [place]] for place in range(8)], "means": {}})
    assert sorted(rollouts._responses) == [(2, 2), (2, 3), (2, 6), (2, 7)]


def test_random_numbers_depend_on_step_and_rank_alone() -> None:
    def drawn(step: int, rank: int) -> float:
        torch.rand(3)
        ranks.restart_random_numbers(trainer(2, rank=rank).args, step)
        return torch.rand(()).item()

    before = torch.get_rng_state()
    try:
        assert drawn(4, 0) == drawn(4, 0)
        assert len({drawn(4, 0), drawn(4, 1), drawn(5, 0)}) == 3
    finally:
        torch.set_rng_state(before)


def test_a_checkpoint_of_other_ranks_begins_them_anew(tmp_path: Path) -> None:
    made, before = kd(tmp_path, tiny.rows(8)), torch.get_rng_state()
    try:
        made.checkpoints.resumed, made.state.global_step = checkpoint(tmp_path, {}, {}), 5
        made._load_rng_state(str(tmp_path))
        found = torch.rand(())
        ranks.restart_random_numbers(made.args, 5)
        assert torch.rand(()) == found
        made.checkpoints.resumed = None
        assert not made.checkpoints.restarts_random_numbers()
    finally:
        torch.set_rng_state(before)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 7, 12, 14])
def test_each_row_of_an_epoch_carries_loss_once_on_any_number_of_ranks(rows: int, world: int, tmp_path: Path) -> None:
    """The rows that accelerate gives to each rank, read past the end as rollouts do."""
    collator = sft(tmp_path, tiny.rows(4)).data_collator
    examples = [{"input_ids": [3, 4 + row], "labels": [-100, 4 + row], "domain": "general"} for row in range(rows)]
    learnt, given = [], trainer(world)
    given.train_dataset = tiny.rows(4).select([0] * rows)
    for rank in range(world):
        sampler = BatchSampler(range(rows), batch_size=2, drop_last=False)
        shard = list(BatchSamplerShard(sampler, world, rank) if world > 1 else sampler)
        progress = SimpleNamespace(end_of_dataloader=False)

        def epoch(shard: Any = shard, progress: Any = progress) -> Any:
            for number, batch in enumerate(shard, 1):
                progress.end_of_dataloader = number == len(shard)
                yield collator([examples[row] for row in batch])
            progress.end_of_dataloader = False

        given.args.process_index, given.accelerator = rank, SimpleNamespace(gradient_state=progress)
        for batch in ranks.drawn(given, epoch(), len(shard) + 3):
            learnt += batch["labels"][batch["labels"] != -100].tolist()
            counted = [example >= 0 for example in batch[EXAMPLES]]
            assert counted == (batch["labels"] != -100).any(dim=1).tolist()
    assert sorted(learnt) == [4 + row for row in range(rows)]


@pytest.mark.parametrize(("split", "even"), [(True, True), (False, False)])
def test_other_ways_to_share_a_batch_are_refused(split: bool, even: bool) -> None:
    loading = SimpleNamespace(split_batches=split, even_batches=even)
    accelerator = SimpleNamespace(parallelism_config=None, num_processes=2, dataloader_config=loading)
    with pytest.raises(UserError, match=r"accelerator_config: split_batches=.*Leave both at their defaults"):
        require_distribution(trainer(2, accelerator=accelerator))
