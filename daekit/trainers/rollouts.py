"""On-policy rows: the student writes the response of some rows of each step, and its teacher scores what it wrote.

1. ``get_batch_samples`` of the trainer asks ``Rollouts.batches`` for the micro-batches of a step. Which of the step's rows are
   on-policy is drawn from (seed, step) as places in the global batch, so that ranks and gradient accumulation do not matter.
2. For ``rollout_buffer`` steps at a time the prompts of all those rows are continued by the student as it stands (eval mode, no
   gradient, cached keys and values), rows of like length together, each with its own seed (seed, step, place).
3. A micro-batch is collated anew with those responses. They alone carry loss in their rows, and are no labels for CE.

What is written but not trained on yet lies in the checkpoint: the student that wrote it is gone by then.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.models.utils import unwrap_model_for_generation

from daekit.data.collator import EXAMPLES, FOR_TEACHER, ON_POLICY, collated_rows
from daekit.errors import UserError
from daekit.generation.local import Sampling, generate, stop_token_ids
from daekit.metrics import TokenMeans
from daekit.models.backbone import base_of
from daekit.models.teacher_view import TEACHER_PROMPT_IDS, first_loss, last_response
from daekit.protocol import IGNORE_INDEX
from daekit.recipe.objective import ROLLOUT_BATCH
from daekit.trainers.config import KDConfig
from daekit.trainers.distributed import rounding, shards_parameters
from daekit.trainers.ranks import drawn, global_batch

logger = logging.getLogger(__name__)

_CHOICE, _DRAW = 1, 2  # of seeds, beside which nothing else draws


class Rollouts:
    """The on-policy rows of one trainer, on this rank.

    Args:
        trainer: A KDTrainer whose model, teacher and data sets are ready.

    Raises:
        UserError: rows, teachers or a distribution with which a student cannot be trained on what it writes.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.objective, args = trainer, trainer.loss_objective, trainer.args
        if trainer.is_fsdp_enabled:
            raise UserError(
                "on_policy_fraction (on_policy) under FSDP2: each token that the student writes would gather every layer anew. "
                "Launch with recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml, or set it to 0."
            )
        if not isinstance(trainer.train_dataset, Dataset):
            raise UserError(
                "on_policy_fraction (on_policy) with a stream: whether its prompts leave room for max_new_tokens cannot be "
                "known before its rows come by. Give a map-style Dataset (datasets.Dataset.from_list(list(stream)))."
            )
        self._stop = stop_token_ids(base_of(trainer.model), trainer.processing_class)
        require_prompts(trainer.train_dataset, args, trainer.processing_class, self._stop)
        self._responses: dict[tuple[int, int], list[int]] = {}  # step, place in the global batch -> token ids
        self._until = 0  # the first step whose responses are not written yet
        self._waiting: deque[Any] = deque()  # micro-batches that have been read ahead
        self._epoch: Iterator[Any] | None = None
        self._means = TokenMeans()

    def batches(self, epoch: Iterator[Any], count: int) -> list[Any]:
        """The next ``count`` micro-batches, one step; those with on-policy rows are collated anew. A collective call."""
        step = self.trainer.state.global_step
        if epoch is not self._epoch:
            self._epoch = epoch
            self._waiting.clear()
        if step >= self._until:
            self._write(step)
        batches = self._next(count)
        responses = {place: self._responses.pop((at, place)) for at, place in list(self._responses) if at == step}
        return [self._with_responses(batch, micro, responses) for micro, batch in enumerate(batches)]

    def chosen(self, step: int) -> list[int]:
        """The places of the on-policy rows in the global batch of a step: over all steps exactly the share that is wanted."""
        rows = global_batch(self.trainer.args)  # of now: a resumed training may have set it anew
        share = Fraction(str(self.objective.on_policy)) * rows
        count = math.floor((step + 1) * share) - math.floor(step * share)
        drawn = np.random.default_rng([self.trainer.args.seed, _CHOICE, step]).permutation(rows)[:count]
        return sorted(drawn.tolist())

    def pop_metrics(self) -> dict[str, float]:
        """Per domain since the last call: mean length, share that ended; and rows per second. A collective call."""
        means = {name: mean for name, (mean, _) in self._means.pop().items() if not name.startswith("seconds/")}
        seconds = means.pop("seconds", None)
        return means | ({} if seconds is None else {"rollout_rows_per_second": self.trainer.args.world_size / seconds})

    def state(self) -> dict[str, Any]:
        """What is written and not trained on yet, and what has been summed since the last log. JSON-able."""
        responses = [[step, place, ids] for (step, place), ids in self._responses.items()]
        return {"until": self._until, "responses": responses, "means": self._means.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state()``, or from the responses of more ranks than this one."""
        self._until = state["until"]
        args = self.trainer.args
        for step, place, ids in state["responses"]:
            if place // args.per_device_train_batch_size % args.world_size == args.process_index:
                self._responses[step, place] = ids
        self._means.load(state["means"])

    def _next(self, count: int) -> list[Any]:
        """So many micro-batches, fewer at the end of the epoch: those that wait, then those of the epoch."""
        assert self._epoch is not None
        waiting = [self._waiting.popleft() for _ in range(min(count, len(self._waiting)))]
        return [*waiting, *drawn(self.trainer, self._epoch, count - len(waiting))]

    def _place(self, micro: int, row: int) -> int:
        """Where a row of a micro-batch of this rank lies in the global batch: as in the one batch of one process."""
        args = self.trainer.args
        return (micro * args.world_size + args.process_index) * args.per_device_train_batch_size + row

    def _write(self, step: int) -> None:
        """Read the micro-batches of a buffer ahead and let the student write the responses of their on-policy rows."""
        args = self.trainer.args
        every = args.gradient_accumulation_steps
        steps = min(self.objective.rollout_buffer, self.trainer.state.max_steps - step)
        self._waiting.extend(self._next(steps * every))
        self._until = step + -(-len(self._waiting) // every)
        chosen = {each: set(self.chosen(each)) for each in range(step, self._until)}
        prompts: dict[tuple[int, int], list[int]] = {}
        for number, batch in enumerate(self._waiting):
            at, micro = step + number // every, number % every
            for row, (ids, labels, _) in enumerate(collated_rows(batch)):
                if (place := self._place(micro, row)) in chosen[at] and batch[EXAMPLES][row] >= 0:
                    prompts[at, place] = ids[: last_response(labels)]
        start = time.perf_counter()
        responses = self._continued(prompts)
        if not responses:
            return
        seconds = torch.full((len(responses),), (time.perf_counter() - start) / len(responses))
        self._means.add("seconds", seconds, torch.zeros(len(responses), dtype=torch.long), ("",))
        self._responses |= responses
        if not any(ids[-1] in self._stop for ids in responses.values()):
            logger.warning(
                "on-policy: none of the %d responses for steps %d to %d ended within max_new_tokens=%d; all were cut",
                len(responses), step + 1, self._until, self.objective.max_new_tokens,
            )  # fmt: skip

    def _continued(self, prompts: Mapping[tuple[int, int], list[int]]) -> dict[tuple[int, int], list[int]]:
        """What the student writes after each prompt, with its end of turn. Under ZeRO-3 a collective call."""
        trainer, objective = self.trainer, self.objective
        most = objective.max_new_tokens
        how = [Sampling(most, objective.rollout_temperature, (trainer.args.seed, _DRAW, *key)) for key in prompts]
        write = functools.partial(generate, max_new_tokens=most, batch_size=ROLLOUT_BATCH, sampling=how, keep_stop=True)
        whole: AbstractContextManager[Any] = nullcontext()
        if shards_parameters(trainer):
            settings = {"gradient_checkpointing_kwargs": trainer.args.gradient_checkpointing_kwargs}
            whole = unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **settings)
        try:
            with rounding(trainer.accelerator), whole:
                written = write(trainer.model, trainer.processing_class, list(prompts.values()))
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"rollout_buffer={objective.rollout_buffer}: {min(len(prompts), ROLLOUT_BATCH)} responses at a time, of up to "
                f"max_new_tokens={most}, do not fit into the memory beside the training. Lower one of the two."
            ) from error
        return dict(zip(prompts, written, strict=True))

    def _with_responses(self, batch: Any, micro: int, responses: Mapping[int, list[int]]) -> Any:
        """A micro-batch with the responses that the student wrote in place of those of the data."""
        of_rows = [responses.get(self._place(micro, row)) for row in range(len(batch["domains"]))]
        own = {row: response for row, response in enumerate(of_rows) if response is not None}
        if not own:
            return batch
        examples: list[dict[str, Any]] = []
        seen = collated_rows(batch.get(FOR_TEACHER, batch))
        for response, (ids, labels, domain), (theirs, wanted, _) in zip(of_rows, collated_rows(batch), seen, strict=True):
            told = theirs[: first_loss(wanted) if response is None else last_response(wanted)]
            if response is not None:
                prompt = ids[: last_response(labels)]
                ids, labels = prompt + response, [IGNORE_INDEX] * len(prompt) + response
            examples.append({"input_ids": ids, "labels": labels, "domain": domain})
            if FOR_TEACHER in batch:
                examples[-1][TEACHER_PROMPT_IDS] = told
        number_R, domains = torch.arange(len(own)), tuple(batch["domains"][row] for row in own)
        self._means.add("rollout_length", torch.tensor([len(ids) for ids in own.values()]), number_R, domains)
        self._means.add("rollout_ended", torch.tensor([ids[-1] in self._stop for ids in own.values()]), number_R, domains)
        written = tuple(response is not None for response in of_rows)
        return self.trainer.data_collator(examples) | {ON_POLICY: written, EXAMPLES: batch[EXAMPLES]}


def require_prompts(dataset: Dataset, args: KDConfig, tokenizer: PreTrainedTokenizerBase, stop: list[int] | None) -> None:
    """Whether the student can write a response to every row of a tokenised data set.

    Args:
        dataset: Rows of ``input_ids``, ``labels`` and ``domain``, each within ``args.max_length``.
        args: Config of the trainer.
        tokenizer: The student's.
        stop: Ids at which generation stops; None: not known yet.

    Raises:
        UserError: rows without a prompt, prompts that leave no room for ``max_new_tokens``, responses that end with no token at
            which generation stops.
    """
    columns = dataset.select_columns(["input_ids", "labels"]).with_format("numpy")
    room = math.inf if args.max_length is None else args.max_length - args.max_new_tokens
    if TEACHER_PROMPT_IDS in dataset.column_names and (limit := args.teacher_max_length or args.max_length) is not None:
        told = np.array([len(prompt or ()) for prompt in dataset[TEACHER_PROMPT_IDS]])
        if (long := told > limit - args.max_new_tokens).any():
            raise UserError(
                f"max_new_tokens={args.max_new_tokens}: {long.sum()} of {len(told)} rows have a teacher_prompt of more "
                f"than teacher_max_length (default: max_length) - max_new_tokens = {limit - args.max_new_tokens} tokens (the "
                f"longest is row {told.argmax()} with {told.max()}). Raise teacher_max_length, or leave those rows out with "
                "overlong: drop."
            )
    starts, ends, last = [], stop is None, 0
    for row in columns:
        if not (row["labels"][1:] != IGNORE_INDEX).any():
            starts.append(1)  # nothing to predict: it is left out
            continue
        starts.append(last_response(row["labels"]))
        ends = ends or bool(np.isin(row["input_ids"][starts[-1] :], stop or []).any())
        last = int(row["input_ids"][row["labels"] != IGNORE_INDEX][-1])
    found, setting = np.array(starts), f"on_policy_fraction={args.on_policy_fraction:g} (on_policy)"
    if (found == 0).any():
        at = int((found == 0).argmax())
        raise UserError(
            f"{setting}: {int((found == 0).sum())} of {len(found)} training rows have no prompt that the student could "
            f"answer (the first is row {at}, domain {dataset[at]['domain']!r}; every token of a text carries loss). Give rows "
            "of prompt and completion or messages, or set it to 0."
        )
    if (found > room).any():
        at = int(found.argmax())
        raise UserError(
            f"max_new_tokens={args.max_new_tokens}: {int((found > room).sum())} of {len(found)} training rows have a prompt "
            f"longer than max_length - max_new_tokens = {room} tokens (the longest is row {at} with {found[at]}). Raise "
            "max_length, lower max_new_tokens, or leave those rows out with overlong: drop."
        )
    if not ends:
        raise UserError(
            f"{setting}: a response would never end: those of the training rows end with "
            f"{tokenizer.convert_ids_to_tokens(last)!r}, generation stops at {tokenizer.convert_ids_to_tokens(stop)}. Set "
            "tokenizer.eos_token to the token with which the chat template ends a turn."
        )
