"""Greedy answers to tokenised prompts, in batches, the same as one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.models.backbone import base_of, frozen_forward
from daekit.models.vocabulary import vocabulary_size


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[list[int]]:
    """The model's most likely next token, again and again, after each prompt.

    Prompts of like length share a batch (left padding). Nothing of the model's own ``generation_config`` takes part but
    its stop tokens: a repetition penalty in it would change greedy answers too. Ids that the tokenizer does not have
    are never generated. Runs in eval mode without gradient; the mode of every module is restored.

    Args:
        model: a causal language model, or a PEFT model around one (with the adapter that is active).
        prompts: token ids, at least one per prompt.
        max_new_tokens: tokens to generate at most.

    Returns:
        The generated ids without the prompt, the stop token and padding, in the order of ``prompts``.

    Raises:
        UserError: if a prompt has no tokens, or the tokenizer has no ``eos_token`` to stop at.
    """
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(
                f"prompt {index} has no tokens: a model needs at least one to start from, for example the BOS token."
            )
    base = base_of(model)
    stop = stop_token_ids(base, tokenizer)
    config = _greedy_config(base, tokenizer, stop, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    # generate() fills every unset field from the model's own config, so that one is taken away for the time being
    own_config, base.generation_config = base.generation_config, GenerationConfig()
    try:
        with frozen_forward(model):
            for start in range(0, len(order), batch_size):
                indices = order[start : start + batch_size]
                for index, answer in zip(indices, _generate_batch(base, [prompts[i] for i in indices], config), strict=True):
                    answers[index] = _until(answer, stop)
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


def _generate_batch(model: PreTrainedModel, prompts: Sequence[Sequence[int]], config: GenerationConfig) -> list[list[int]]:
    width = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.full((len(prompts), width), config.pad_token_id)
    mask_BT = torch.zeros_like(input_ids_BT)
    for index, prompt in enumerate(prompts):
        input_ids_BT[index, width - len(prompt) :] = torch.tensor(prompt)
        mask_BT[index, width - len(prompt) :] = 1
    device = model.device
    output_BT: Tensor = model.generate(  # type: ignore[operator]
        input_ids_BT.to(device), attention_mask=mask_BT.to(device), generation_config=config
    )
    return output_BT[:, width:].tolist()


def _until(answer: list[int], stop: Sequence[int]) -> list[int]:
    end = next((at for at, token in enumerate(answer) if token in stop), len(answer))
    return answer[:end]
