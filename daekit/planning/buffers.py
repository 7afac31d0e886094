"""The memory of a stage besides weights and activations: the teachers' outputs and the buffers of the losses."""

from __future__ import annotations

from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from daekit.losses.attention_blocks import BLOCK_VALUES, SHORTEST_BLOCK
from daekit.losses.chunk import chunk_losses_on
from daekit.losses.prediction import tokens_per_chunk
from daekit.models.features import feature_spec, layers_of
from daekit.planning.machine import Machine
from daekit.planning.models import StageModels
from daekit.planning.trace import MicroBatch, Tracer, peak_bytes
from daekit.planning.training import Training
from daekit.protocol import OutputHead
from daekit.recipe.objective import Objective
from daekit.recipe.schema import StageSpec

_TILE = 2**22  # values of the head's gradient that are summed at a time


class Buffers:
    """The buffers of one stage, in bytes.

    Args:
        stage: A stage of a resolved recipe.
        models: Its models.
        training: Its options.
        machine: Where it runs.
        batch: One micro-batch; all its tokens are loss tokens.
    """

    def __init__(self, stage: StageSpec, models: StageModels, training: Training, machine: Machine, batch: MicroBatch) -> None:
        self.stage, self.models, self.training, self.machine, self.batch = stage, models, training, machine, batch
        self.tokens = training.tokens  # N
        self.student = models.student.meta

    @property
    def hidden(self) -> int:
        """Bytes of the student's hidden states at all positions."""
        return self._hidden(self.models.student)

    def _hidden(self, tracer: Tracer) -> int:
        return self.tokens * int(tracer.meta.config.hidden_size) * tracer.cost(self.batch).hidden_width

    @property
    def compute_width(self) -> int:
        """Bytes of a value that the student's layers compute."""
        return self._compute_width(self.models.student)

    def _compute_width(self, tracer: Tracer) -> int:
        autocast = self.training.autocast
        return tracer.cost(self.batch).hidden_width if autocast is None else autocast.itemsize

    def extra_saved(self, layers: int) -> int:
        """Gradients that attention and hidden-state losses compute in the forward pass, spread evenly over the layers."""
        return layers * self._features(self.models.student) // len(self.student.layers)

    def _features(self, tracer: Tracer) -> int:
        """Queries, keys and hidden states that are compared, of one model's layers."""
        attention, hidden = self.feature_layers
        config = tracer.meta.config
        values = (config.num_attention_heads + key_value_heads(config)) * head_width(config)
        return self.tokens * attention * values * self._compute_width(tracer) + hidden * self._hidden(tracer)

    @cached_property
    def feature_layers(self) -> tuple[int, int]:
        """(layers of the student whose attention is compared, layers whose hidden states are)."""
        if self.stage.type == "sft":
            return 0, 0
        spec = feature_spec(self.stage.loss, self.student.config)
        if spec is None:
            return 0, 0
        teachers = [each.meta.config for members in self.models.teachers for each in members]
        layers = [layers_of(spec, config) for config in teachers or [self.student.config]]
        return len({n for each in layers for n in each.attention}), len({n for each in layers for n in each.hidden})

    @cached_property
    def teacher_outputs(self) -> tuple[int, int]:
        """(what the outputs of the largest teacher hold until the loss, what of it until the end of the backward pass)."""
        sizes = []
        for members in self.models.teachers:
            features = sum(self._features(each.tracer) for each in members)
            last = sum(self._hidden(each.tracer) for each in members)
            sizes.append((last + features, features if self.training.checkpointing else 0))
        return max(sizes, default=(0, 0))

    @cached_property
    def scores(self) -> int:
        """Blocks of attention scores of both models; GPU kernels hold none."""
        if not self.feature_layers[0] or self.machine.gpu:
            return 0
        row = self.student.config.num_attention_heads * self.training.length
        return 4 * 4 * max(BLOCK_VALUES, SHORTEST_BLOCK * row)

    @cached_property
    def loss(self) -> tuple[int, int]:
        """(gradients that the loss keeps for the backward pass, its work space)."""
        head = self.student.head
        columns, hidden_size = head.shape
        gpu, width = self.machine.gpu, self.compute_width
        step = min(tokens_per_chunk(columns, gpu), self.tokens)
        members = max(map(len, self.models.teachers), default=0)
        kept = self.hidden + gradient_bytes(head)
        work = step * columns * (width + (4 if members else 0)) + step * hidden_size * (width + 4)
        if not gpu:
            loss = self.stage.loss
            objective = loss.model_copy(update={"ce_weight": loss.ce_weight or 1.0 * (not members)})
            work += _chunk_bytes(objective, step, columns, bool(members), torch.bfloat16 if width == 2 else torch.float32)
        elif width != 4 and members:
            work += step * columns * width  # a teacher's linear outputs, before they are copied in float32
        work += max(members - 1, 0) * step * columns * 4
        # copies of output heads in the dtype of the products
        heads = [head, *(each.meta.head for each in max(self.models.teachers, key=len, default=[]))]
        work += sum(each.numel() * width for each in heads if each.element_size() != width)
        if head.requires_grad and (self.tokens > step or len(self.models.teachers) > 1) and head.element_size() != 4:
            work += head.numel() * 4  # summed in float32
        if head.requires_grad and self.tokens > step:
            work += 4 * _TILE
        return kept, work


@cache  # the largest micro-batch is looked for by guesses, and all that are larger than a chunk have the same one
def _chunk_bytes(objective: Objective, step: int, columns: int, has_teacher: bool, dtype: torch.dtype) -> int:
    """Temporaries of one chunk of ``step`` tokens on a CPU, measured on the loss itself."""
    with FakeTensorMode():
        student = torch.empty(step, columns, dtype=dtype)
        teacher = torch.empty(step, columns) if has_teacher else None
        labels = torch.zeros(step, dtype=torch.long)
        head = OutputHead(student, None, columns)
        given = [t for t in (student, teacher, labels) if t is not None]
        losses = chunk_losses_on(student.device, dtype)
        return peak_bytes(lambda: losses(student, teacher, labels, objective, head, True), given)


def gradient_bytes(weight: Tensor) -> int:
    """Bytes of a weight's gradient; 0 if it is not trained."""
    return weight.numel() * weight.element_size() if weight.requires_grad else 0


def key_value_heads(config: Any) -> int:
    """The number of heads of keys and values."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def head_width(config: Any) -> int:
    """D, the width of an attention head, as transformers reads it from a config."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)
