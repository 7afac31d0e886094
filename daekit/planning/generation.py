"""What it takes that a model writes: cached keys and values, the prompts' forward pass, and one pass per token."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from daekit.planning.buffers import head_width
from daekit.planning.trace import MicroBatch, Tracer
from daekit.planning.training import Training
from daekit.recipe.objective import Objective

TOGETHER = 64  # rows that ``trainers.rollouts`` continues in one batch; a test compares them
KEYS_AND_VALUES, ACTIVATIONS = "cached keys and values", "activations"


def rollout_rows(loss: Objective, training: Training) -> int:
    """The rows of one device that the student continues in one batch, of those that a buffer of steps holds."""
    return min(TOGETHER, math.ceil(loss.on_policy * training.rows * training.accumulation * loss.rollout_buffer))


def writing(tracer: Tracer, batch: MicroBatch, new_tokens: int, width: int) -> Counter[str]:
    """The parts of a model that continues prompts, at the step that needs most.

    Args:
        tracer: Its tracer.
        batch: The prompts.
        new_tokens: Tokens that are written at most.
        width: Bytes of a value of keys and values.
    """
    cost, layers, vocabulary = tracer.cost(batch), len(tracer.meta.layers), tracer.meta.head.shape[0]
    prompts = key_value_bytes(tracer.meta.config, batch.rows * batch.length, width) * layers
    reading = max(layer.frozen for layer in cost.layers) + cost.layers[0].output + cost.shared
    last = key_value_bytes(tracer.meta.config, batch.rows * (batch.length + new_tokens), width)
    logits = 2 * 4 * batch.rows * vocabulary  # of the last position alone, and their probabilities
    if prompts + reading > last * (layers + 1) + logits:
        return Counter({KEYS_AND_VALUES: prompts, ACTIVATIONS: reading})
    # each step makes a layer's keys and values anew, one token longer
    return Counter({KEYS_AND_VALUES: last * layers, ACTIVATIONS: last + logits})


def key_value_bytes(config: Any, tokens: int, width: int) -> int:
    """Bytes of one layer's keys and values."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * tokens * int(heads) * head_width(config) * width
