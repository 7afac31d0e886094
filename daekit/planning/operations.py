"""Floating-point operations of a step: products of matrices, two per multiplied value; everything else is left out."""

from __future__ import annotations

from collections.abc import Iterable

from daekit.planning.buffers import head_width
from daekit.planning.memory import StageMemory
from daekit.planning.skeleton import Parameter, Skeleton


def step_operations(memory: StageMemory) -> float:
    """Of one optimizer step on one device: all its micro-batches, rows of ``max_length`` tokens.

    Of several teachers the dearest speaks for every row; attention is causal; a quantised weight counts as any other.
    """
    training, student = memory.training, memory.student
    tokens, length = training.tokens, training.length
    forward = _forward(student, tokens, length)
    attention = _attention(student, tokens, length)
    trained = 2 * tokens * _products(p for p in student.parameters() if p.trained)
    step = 2 * forward + attention + trained  # the backward pass of attention is twice its forward pass
    if training.checkpointing:
        step += forward - 2 * tokens * student.head.numel()
    layers, _ = memory.buffers.watched_layers
    # scores of both models, gradients of queries and keys
    step += 4 * layers * attention / len(student.layers) / 2
    speakers = (sum(_forward(speaker.skeleton, tokens, length) for speaker in group) for group in memory.models.groups)
    return (step + max(speakers, default=0)) * training.accumulation


def _forward(skeleton: Skeleton, tokens: int, length: int) -> float:
    return 2 * tokens * _products(skeleton.parameters()) + _attention(skeleton, tokens, length)


def _attention(skeleton: Skeleton, tokens: int, length: int) -> float:
    """Scores and weighted values, of half of the keys."""
    width = skeleton.config.num_attention_heads * head_width(skeleton.config)
    return 2 * tokens * length * width * len(skeleton.layers)


def _products(parameters: Iterable[Parameter]) -> float:
    return sum(p.values * p.products for p in parameters)
