"""Answers to tokenised prompts, greedy or drawn, in batches, the same as one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from daekit.errors import UserError
from daekit.models.backbone import base_of, frozen_forward
from daekit.models.vocabulary import vocabulary_size

_NUCLEUS = 1024  # tokens among which the nucleus is sought first


@dataclass(frozen=True)
class Sampling:
    """How the answer to one prompt is found.

    Attributes:
        temperature: temperature of the distribution (no top-k); 0: the most likely token.
        seed: whole numbers that decide what is drawn, whatever else is in the batch.
        max_new_tokens: at most so many tokens for this prompt.
        top_p: only the likeliest tokens that together have this probability are drawn; 1: all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seed: tuple[int, ...] = (0,)
    top_p: float = 1.0


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
    sampling: Sequence[Sampling] | None = None,
    keep_stop: bool = False,
    progress: Callable[[int, int], None] | None = None,
    stop: Sequence[int] = (),
    watch: Callable[[Tensor], bool] | None = None,
) -> list[list[int]]:
    """The model's most likely next token, or one drawn as ``sampling`` says, again and again, after each prompt.

    Prompts of like length share a batch (left padding). Nothing of the model's own ``generation_config`` takes part but
    its stop tokens: a repetition penalty in it would change greedy answers too. Ids that the tokenizer does not have
    are never generated. Runs in eval mode without gradient; the mode of every module is restored.

    Args:
        model: a causal language model, or a PEFT model around one (with the adapter that is active).
        prompts: token ids, at least one per prompt.
        max_new_tokens: tokens to generate at most.
        sampling: one per prompt; default: all greedy.
        keep_stop: Leave the stop token at the end of an answer that has one.
        progress: called with (prompts done, all of them) after each batch.
        stop: ids to stop at besides those of tokenizer and model.
        watch: called after each step with the batch's ids ``[B, T]``, prompt included; true ends the batch.

    Returns:
        The generated ids without the prompt, the stop token and padding, in the order of ``prompts``. An answer as long as
        it may be was cut.

    Raises:
        UserError: if a prompt has no tokens, the tokenizer has no ``eos_token`` to stop at, or ``sampling`` is given and the
            model's probabilities are no numbers.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"prompt {index} has no tokens: a model needs at least one to start from, for example the BOS token."
            )
    base = base_of(model)
    stop = sorted({*stop_token_ids(base, tokenizer), *stop})
    config = _greedy_config(base, tokenizer, stop, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    # generate() fills every unset field from the model's own config, so that one is taken away for the time being
    own_config, base.generation_config = base.generation_config, GenerationConfig()
    try:
        with frozen_forward(model):
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                some = None if sampling is None else [sampling[i] for i in indices]
                batch = _generate_batch(base, [prompts[i] for i in indices], config, some, watch)
                for index, answer in zip(indices, batch, strict=True):
                    end = next((at + keep_stop for at, token in enumerate(answer) if token in stop), len(answer))
                    answers[index] = answer[:end]
                if progress is not None:
                    progress(min(start + batch_size, len(order)), len(order))
    finally:
        base.generation_config = own_config
    return answers


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's EOS and whatever other special tokens the model's generation config stops at (Llama 3 has
    several)."""
    if tokenizer.eos_token_id is None:
        raise UserError("the tokenizer has no eos_token: generation would never stop. Set tokenizer.eos_token.")
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    own_ids = own if isinstance(own, list) else [] if own is None else [own]
    # a model made from a config carries its class's default EOS id, which is an ordinary word of another tokenizer
    return sorted({tokenizer.eos_token_id} | {index for index in own_ids if index in tokenizer.added_tokens_decoder})


def _greedy_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: list[int], max_new_tokens: int
) -> GenerationConfig:
    columns = model.get_output_embeddings().weight.shape[0]  # type: ignore[union-attr]
    padding_columns = list(range(vocabulary_size(tokenizer), columns))
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=stop,
        pad_token_id=stop[0],
        suppress_tokens=padding_columns or None,
    )


def pad_left(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """``input_ids_BT`` with the token ``padding`` before shorter prompts, and the mask that is 0 there."""
    ids = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    ones = [torch.ones_like(each) for each in ids]
    return pad_sequence(ids, True, padding, "left"), pad_sequence(ones, True, padding_side="left")


def _generate_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    sampling: Sequence[Sampling] | None,
    watch: Callable[[Tensor], bool] | None,
) -> list[list[int]]:
    input_ids_BT, mask_BT = pad_left(prompts, config.pad_token_id)
    device, width = model.device, input_ids_BT.shape[1]
    criteria = StoppingCriteriaList()
    how: dict[str, Any] = {"stopping_criteria": criteria}
    if watch is not None:
        criteria.append(lambda ids_BT, _: torch.full((len(ids_BT),), watch(ids_BT), device=device))
    if sampling is not None:
        how["logits_processor"] = LogitsProcessorList([_Sampler(sampling, width)])
        end_B = torch.tensor([width + each.max_new_tokens for each in sampling], device=device)
        criteria.append(lambda ids_BT, _: ids_BT.shape[1] >= end_B)
    # each rank generates its own rows, with whole weights: under ZeRO transformers would wait for the other ranks
    output_BT: Tensor = model.generate(  # type: ignore[operator]
        input_ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config, synced_gpus=False, **how
    )
    return output_BT[:, width:].tolist()


class _Sampler(LogitsProcessor):
    """Leaves only the drawn token of each row with a temperature: the first whose cumulative probability is above a number
    between 0 and 1 that the row's seed and the step decide. A global random state takes no part, so a batch does not change
    its rows."""

    def __init__(self, sampling: Sequence[Sampling], width: int) -> None:
        self.width = width
        self.drawn = [row for row, each in enumerate(sampling) if each.temperature > 0]
        self.temperature_D1 = torch.tensor([[sampling[row].temperature] for row in self.drawn], dtype=torch.float64)
        self.top_p_D1 = torch.tensor([[sampling[row].top_p] for row in self.drawn], dtype=torch.float64)
        longest = max(each.max_new_tokens for each in sampling)
        numbers = [np.random.default_rng(sampling[row].seed).random(longest) for row in self.drawn]
        self.number_DS = torch.tensor(np.array(numbers), dtype=torch.float64)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not (scores < torch.inf).all():
            raise UserError(
                "generation: the model's next-token scores are NaN or infinite, so nothing can be drawn from them. Its "
                "weights are broken (a learning rate that is too high?), or its dtype overflows: use bfloat16 or float32"
            )
        if not self.drawn:
            return scores
        step = input_ids.shape[1] - self.width
        rows = torch.tensor(self.drawn, device=scores.device)
        number_D1 = self.number_DS[:, step : step + 1].to(scores.device)
        probability_DV = (scores[rows].double() / self.temperature_D1.to(scores.device)).softmax(-1)
        cumulative_DV = _nucleus(probability_DV, self.top_p_D1.to(scores.device)).cumsum(-1)
        total_D1 = cumulative_DV[:, -1:]
        below_D1 = torch.minimum(number_D1 * total_D1, torch.nextafter(total_D1, torch.zeros_like(total_D1)))
        token_D1 = torch.searchsorted(cumulative_DV, below_D1, right=True)
        only_DV = torch.full_like(scores[rows], -torch.inf).scatter_(1, token_D1, 0.0)
        return scores.index_copy(0, rows, only_DV)


def _nucleus(probability_DV: Tensor, top_p_D1: Tensor) -> Tensor:
    """The probabilities with 0 for tokens behind the likeliest that together have ``top_p``; rows with 1 as they are."""
    if bool((top_p_D1 >= 1).all()):
        return probability_DV
    top_p_D1 = top_p_D1.where(top_p_D1 < 1, torch.inf)
    for count in (_NUCLEUS, probability_DV.shape[-1]):  # to sort a whole vocabulary would take as long as the model
        likeliest = probability_DV.topk(min(count, probability_DV.shape[-1]))
        before_DK = likeliest.values.cumsum(-1) - likeliest.values
        if bool(((before_DK[:, -1:] >= top_p_D1) | top_p_D1.isinf()).all()):
            break
    kept_DK = likeliest.values.masked_fill(before_DK >= top_p_D1, 0.0)
    nucleus_DV = torch.zeros_like(probability_DV).scatter_(1, likeliest.indices, kept_DK)
    return torch.where(top_p_D1.isinf(), probability_DV, nucleus_DV)


def device() -> torch.device:
    """The accelerator, or the CPU."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")
