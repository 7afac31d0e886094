"""The memory of one stage: what stands all the time, and what lives at the moments that may be the highest.

A step is: the teachers run without gradient; the student runs; the loss; the backward pass, layer by layer from the last; the
optimizer. Each moment is a table of bytes by part, and the peak is the moment with the largest sum. Planned is the worst
micro-batch: all rows have ``max_length`` tokens, all tokens are kept, and of several teachers the largest speaks for all rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from daekit.planning.buffers import Buffers
from daekit.planning.models import Speaker, StageModels
from daekit.planning.trace import LayerCost, ModelCost, Setting
from daekit.planning.training import Machine, Training, optimizer_bytes
from daekit.recipe.schema import StageSpec

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "student weights", "adapters", "gradients", "optimizer"
ACTIVATIONS, SIGNALS, LOSS, MASK = "activations", "teacher signals", "loss buffers", "attention work space"
GATHERED, BUCKETS, OVERHEAD = "gathered layers", "gradient buckets", "CUDA context"


@dataclass(frozen=True)
class Memory:
    """Bytes per device by part, at the highest moment."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


class StageMemory:
    """Plans one stage.

    Args:
        stage: of a resolved recipe.
        models: its models.
        training: its options.
        machine: where it runs.
    """

    def __init__(self, stage: StageSpec, models: StageModels, training: Training, machine: Machine) -> None:
        self.stage, self.models, self.training, self.machine = stage, models, training, machine
        flat, rows, length = training.flat, training.rows, training.length
        self.setting = Setting(
            1 if flat else rows, rows * length if flat else length, training.attention_mask, training.autocast, machine.gpu
        )
        self.buffers = Buffers(stage, models, training, machine, self.setting)
        self.student = models.student.skeleton

    # ---- what stands ------------------------------------------------------------------------------------------------

    @cached_property
    def standing(self) -> Counter[str]:
        """Weights, optimizer and, where micro-batches accumulate, gradients."""
        parts: Counter[str] = Counter()
        for parameter in self.student.parameters():
            width = self._master_width if parameter.trained else 0
            size = max(parameter.bytes, parameter.values * width) // self.machine.shards("weights")
            parts[ADAPTERS if parameter.adapter else WEIGHTS] += size
        for speaker in self.models.speakers:
            if speaker.adapter:
                parts[ADAPTERS] += speaker.bytes
            else:
                parts[f"{speaker.name} weights"] += speaker.bytes // self._teacher_shards(speaker)
        parts[OPTIMIZER] = self._optimizer[0]
        if self.training.accumulation > 1:
            parts[GRADIENTS] = max(self.gradients, self._unreduced)
        if self.machine.engine == "ddp" and self.machine.count > 1:
            parts[BUCKETS] = self.gradients
        parts[GATHERED] = self._gathered
        parts[OVERHEAD] = self.machine.overhead
        return parts

    @cached_property
    def _master_width(self) -> int:
        """accelerate trains in float32 what FSDP2 splits under mixed precision."""
        return 4 if self.machine.engine == "fsdp2" and self.training.autocast is not None else 0

    def _teacher_shards(self, speaker: Speaker) -> int:
        """A quantised teacher stays whole on each device."""
        return 1 if speaker.skeleton.shape.quantization else self.machine.shards("teachers")

    @cached_property
    def _optimizer(self) -> tuple[int, int]:
        states, step = optimizer_bytes(self.training.optim, self.student.parameters(), self.machine.gpu)
        trained = [p for p in self.student.parameters() if p.trained]
        if self._master_width:
            states = int(states * 4 * sum(p.values for p in trained) / max(sum(p.values * p.width for p in trained), 1))
        if self.machine.engine in ("zero2", "zero3"):  # DeepSpeed steps in float32, on a copy of the weights
            states = 12 * sum(p.values for p in trained)
        shards = self.machine.shards("optimizer")
        return states // shards, step // shards

    @cached_property
    def gradients(self) -> int:
        """Of all trained parameters, on one device."""
        trained = [p for p in self.student.parameters() if p.trained]
        return sum(p.values * max(p.width, self._master_width) for p in trained) // self.machine.shards("gradients")

    @cached_property
    def _unreduced(self) -> int:
        """Whole gradients that FSDP2 keeps on every device until the last micro-batch of a step, in the reduction's dtype."""
        if self.machine.engine != "fsdp2" or self.training.accumulation == 1:
            return 0
        trained = [p for p in self.student.parameters() if p.trained]
        return sum(p.values * (2 if self.training.autocast is not None else p.width) for p in trained)

    @cached_property
    def _gathered(self) -> int:
        """What a sharding engine puts together: two layers of weights, the ends of the model, one layer of gradients."""
        if self.machine.shards("weights") == 1:
            return 0
        width = 2 if self.training.autocast is not None else 4

        def layer(speaker: Any, trained_only: bool = False) -> int:
            layers = [sum(p.values * width for p in each if p.trained or not trained_only) for each in speaker.layers]
            return max(layers)

        ends = sum(p.values * width for p in self.student.outside)
        sharded = [s.skeleton for s in self.models.speakers if not s.adapter and self._teacher_shards(s) > 1]
        heads = max((skeleton.head.numel() * width for skeleton in sharded), default=0)
        own = 2 * layer(self.student) + ends + layer(self.student, trained_only=True)
        return max(own + heads, max((2 * layer(s) + sum(p.values * width for p in s.outside) for s in sharded), default=0))

    # ---- the moments --------------------------------------------------------------------------------------------------

    def peak(self) -> Memory:
        """The highest moment of a step."""
        return max(self.moments(), key=lambda memory: memory.total)

    def moments(self) -> list[Memory]:
        """All moments of a step."""
        moments = {f"{speaker.name} runs": self._teacher_runs(speaker) for speaker in self.models.speakers}
        moments |= {
            "the student runs": self._student_runs(),
            "the loss": self._loss(),
            "the backward pass of the loss": self._backward_of_head(),
            "the backward pass of the last layer": self._backward(last=True),
            "the backward pass of the first layer": self._backward(last=False),
            "the backward pass of the embedding": self._backward_of_embedding(),
            "the optimizer's step": self._with({GRADIENTS: self.gradients, OPTIMIZER: self._optimizer[1]}),
        }
        return [Memory(moment, {part: size for part, size in parts.items() if size}) for moment, parts in moments.items()]

    def _with(self, parts: dict[str, int]) -> Counter[str]:
        """What stands, and this; gradients that stand already are not there twice."""
        together = Counter(self.standing)
        for part, size in parts.items():
            if part != GRADIENTS or self.training.accumulation == 1:
                together[part] += size
        return together

    @cached_property
    def _cost(self) -> ModelCost:
        return self.models.student.cost(self.setting)

    def _teacher_runs(self, speaker: Speaker) -> Counter[str]:
        cost = speaker.tracer.cost(self.setting)
        highest = max(layer.frozen for layer in cost.layers)
        return self._with({ACTIVATIONS: highest + cost.layers[0].output + cost.shared, SIGNALS: self.buffers.signals[0]})

    def _student_runs(self) -> Counter[str]:
        layers = self._cost.layers
        if self.training.checkpointing:
            more = max(layer.checkpointed - layer.output - layer.cached for layer in layers)
        else:
            more = max(layer.forward - layer.saved for layer in layers)
        return self._with(
            {ACTIVATIONS: self._saved + self._cached + more, SIGNALS: self.buffers.signals[0], MASK: self.buffers.scores}
        )

    def _loss(self) -> Counter[str]:
        kept, work = self.buffers.loss
        return self._with(
            {ACTIVATIONS: self._saved + self._cached, SIGNALS: self.buffers.signals[0], LOSS: kept + work + self.buffers.hidden}
        )

    def _backward_of_head(self) -> Counter[str]:
        """Gradients of the loss are scaled: for a moment they are there twice."""
        return self._with({ACTIVATIONS: self._saved, SIGNALS: self.buffers.signals[1], LOSS: 2 * self.buffers.loss[0]})

    def _backward(self, last: bool) -> Counter[str]:
        layers = self._cost.layers
        ends = self.buffers.hidden + self._cost.shared
        gradient = layers[0].output
        if self.training.checkpointing:
            inputs = sum(layer.output + layer.stashed for layer in layers) if last else 0
            again = [self._again(layer) for layer in (layers if last else layers[:1])]
            activations = ends + inputs + gradient + max(again)
        else:
            saved = sum(layer.saved for layer in layers) if last else layers[0].saved
            activations = (
                ends
                + saved
                + self.buffers.extra_saved(len(layers) if last else 1)
                + gradient
                + self._own(layers[-1 if last else 0])
            )
        gradients = (
            self.buffers.head_gradient if last else self.gradients - self._gradients_of(0) - self.buffers.embedding_gradient
        )
        return self._with(
            {
                ACTIVATIONS: activations,
                GRADIENTS: max(gradients, 0),
                SIGNALS: self.buffers.signals[1],
                MASK: self.buffers.scores,
            }
        )

    def _again(self, layer: LayerCost) -> int:
        """The most of a checkpointed layer in the backward pass: it is run once more, then backward."""
        return max(layer.forward, layer.saved + self.buffers.extra_saved(1) + self._own(layer))

    def _own(self, layer: LayerCost) -> int:
        return layer.backward_again if self.training.accumulation > 1 else layer.backward

    def _backward_of_embedding(self) -> Counter[str]:
        new = self.buffers.embedding_bytes if self.buffers.embedding_trained else 0
        present = 0 if self.training.accumulation > 1 or self.student.tied else new
        gradients = self.gradients - present
        return self._with(
            {
                ACTIVATIONS: self.buffers.hidden + self._cost.shared,
                GRADIENTS: gradients,
                LOSS: new,
                SIGNALS: self.buffers.signals[1],
            }
        )

    @cached_property
    def _saved(self) -> int:
        """Activations at the end of the student's forward pass."""
        cost = self._cost
        if self.training.checkpointing:
            return cost.ends + cost.shared + sum(layer.output + layer.stashed for layer in cost.layers)
        return cost.ends + cost.shared + sum(layer.saved for layer in cost.layers) + self.buffers.extra_saved(len(cost.layers))

    @cached_property
    def _cached(self) -> int:
        """Copies of weights that autocast made and that nothing else keeps."""
        return sum(layer.cached for layer in self._cost.layers)

    def _gradients_of(self, layer: int) -> int:
        trained = [p for p in self.student.layers[layer] if p.trained]
        return sum(p.values * max(p.width, self._master_width) for p in trained) // self.machine.shards("gradients")
