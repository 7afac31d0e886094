"""Counts the floating-point operations of a step: two per multiplied value of a matrix product; all else is left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from daekit.planning.buffers import head_width
from daekit.planning.meta_model import MetaModel, Parameter

if TYPE_CHECKING:
    from daekit.planning.memory import StageMemory


def step_operations(memory: StageMemory) -> float:
    """Operations of one optimizer step on one device: all its micro-batches, with rows of ``max_length`` tokens.

    Of several teachers the most expensive runs on every row. Attention is causal. A quantised weight counts as any other.
    """
    training, student = memory.training, memory.student
    tokens, length = training.tokens, training.length
    forward = forward_operations(student, tokens, length)
    attention = _attention(student, tokens, length)
    trained = 2 * tokens * _products(p for p in student.parameters() if p.trained)
    step = 2 * forward + attention + trained  # the backward pass of attention is twice its forward pass
    if training.checkpointing:
        step += forward - 2 * tokens * student.head.numel()
    step += memory.stage.loss.on_policy * forward  # of the rows that the student writes
    layers, _ = memory.buffers.feature_layers
    # the scores of both models, and the gradients of queries and keys
    step += 4 * layers * attention / len(student.layers) / 2
    tokens, length = training.rows * training.teacher_length, training.teacher_length
    teachers = (sum(forward_operations(each.meta, tokens, length) for each in members) for members in memory.models.teachers)
    return (step + max(teachers, default=0)) * training.accumulation


def forward_operations(meta: MetaModel, tokens: int, length: float) -> float:
    """Operations of a forward pass over tokens in rows of this mean length, the output head included."""
    return 2 * tokens * _products(meta.parameters()) + _attention(meta, tokens, length)


def _attention(meta: MetaModel, tokens: int, length: float) -> float:
    """Scores and weighted values; causal attention computes them for half of the keys."""
    width = meta.config.num_attention_heads * head_width(meta.config)
    return 2 * tokens * length * width * len(meta.layers)


def _products(parameters: Iterable[Parameter]) -> float:
    return sum(p.values * p.products for p in parameters)
