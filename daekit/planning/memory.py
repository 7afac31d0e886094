"""The memory of one stage: static memory, which is there in the whole step, and what each phase of the step adds to it.

The phases are: the teachers run without gradient; the student runs; the loss; the backward pass, layer by layer from the last;
the optimizer. Each phase is a table of bytes by part, and the peak is the phase with the largest sum. The plan is for the
largest micro-batch: all rows have ``max_length`` tokens, all tokens carry loss, and of several teachers the largest runs on all
rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

from daekit.planning.buffers import Buffers, gradient_bytes
from daekit.planning.generation import writing
from daekit.planning.machine import Machine
from daekit.planning.meta_model import MetaModel, Parameter
from daekit.planning.models import FrozenModel, StageModels
from daekit.planning.trace import MicroBatch, ModelCost
from daekit.planning.training import Training, optimizer_bytes
from daekit.recipe.objective import ROLLOUT_BATCH
from daekit.recipe.schema import StageSpec

WEIGHTS, ADAPTERS, GRADIENTS, OPTIMIZER = "student weights", "adapters", "gradients", "optimizer"
ACTIVATIONS, OUTPUTS, LOSS, SCORES = "activations", "teacher outputs", "loss buffers", "attention work space"
GATHERED, BUCKETS, CONTEXT, LIBRARIES = "gathered layers", "gradient buckets", "CUDA context", "interpreter and libraries"


@dataclass(frozen=True)
class Memory:
    """Bytes per device by part, in one phase of a step."""

    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


class StageMemory:
    """Plans the memory of one stage.

    Args:
        stage: A stage of a resolved recipe.
        models: Its models.
        training: Its options.
        machine: Where it runs.
    """

    def __init__(self, stage: StageSpec, models: StageModels, training: Training, machine: Machine) -> None:
        self.stage, self.models, self.training, self.machine = stage, models, training, machine
        rows, merged = (1, training.rows) if training.flat else (training.rows, 1)  # rows in one, end to end
        self.batch, self.teacher_batch = (
            MicroBatch(rows, merged * length, training.attention_mask, training.autocast, training.accumulation > 1)
            for length in (training.length, training.teacher_length)
        )
        self.buffers = Buffers(stage, models, training, machine, self.batch)
        self.student = models.student.meta

    def of_rows(self, rows: int) -> StageMemory:
        """The same with so many rows in a micro-batch."""
        return StageMemory(self.stage, self.models, replace(self.training, rows=rows), self.machine)

    # ---- static memory ----------------------------------------------------------------------------------------------

    @cached_property
    def static(self) -> Counter[str]:
        """Weights, optimizer, the process itself and, where micro-batches accumulate, gradients."""
        parts: Counter[str] = Counter()
        for parameter in self.student.parameters():
            parts[ADAPTERS if parameter.adapter else WEIGHTS] += self._split(parameter)
        parts[WEIGHTS] += _kept_whole(self.student, self.machine.shards("weights"))
        for model in self.models.frozen:
            part, shards = ADAPTERS if model.adapter else f"{model.name} weights", self._teacher_shards(model)
            parts[part] += model.bytes if model.adapter else model.bytes // shards + _kept_whole(model.meta, shards)
        parts[OPTIMIZER] = self._optimizer[0]
        if self.training.accumulation > 1:
            parts[GRADIENTS] = max(self.gradients, self._unreduced)
        if self.machine.engine == "ddp" and self.machine.count > 1:
            parts[BUCKETS] = self.gradients
        parts[GATHERED] = self._gathered
        parts[CONTEXT if self.machine.gpu else LIBRARIES] = self.machine.overhead
        return parts

    def split_bytes(self, meta: MetaModel) -> int:
        """A device's part of the weights of a model that FSDP2 or ZeRO-3 splits, adapters left out."""
        return sum(self._split(parameter) for parameter in meta.parameters() if not parameter.adapter)

    def _split(self, parameter: Parameter) -> int:
        width = self._master_width if parameter.trained else 0
        return max(parameter.bytes, parameter.values * width) // self.machine.shards("weights")

    @cached_property
    def _master_width(self) -> int:
        """Bytes per value that accelerate trains in: float32 where FSDP2 splits the weights under mixed precision, else 0."""
        return 4 if self.machine.engine == "fsdp2" and self.training.autocast is not None else 0

    def _teacher_shards(self, model: FrozenModel) -> int:
        """The parts that a frozen model is split into; of quantised ones FSDP2 splits 4 bits, the others stay whole."""
        four_bits = model.meta.spec.quantization == "4bit" and self.machine.engine == "fsdp2"
        splits = not model.whole and (model.meta.spec.quantization is None or four_bits)
        return self.machine.shards("weights") if splits else 1

    @cached_property
    def _trained(self) -> list[Parameter]:
        return [p for p in self.student.parameters() if p.trained]

    @cached_property
    def _optimizer(self) -> tuple[int, int]:
        """(bytes of the states, the most bytes that a step needs besides), on one device."""
        states, step = optimizer_bytes(self.training.optim, self.student.parameters(), self.machine.gpu)
        if self._master_width:
            states = self._in_float32(states)
        if self.machine.engine in ("zero2", "zero3"):  # DeepSpeed steps in float32, on a copy of the weights
            states = 12 * sum(p.values for p in self._trained)
        shards = self.machine.shards("optimizer")
        return states // shards, step // shards

    @property
    def deepspeed_start(self) -> int:
        """What DeepSpeed holds beside the weights when ZeRO-3 begins: copies and gradients in float32, and the states."""
        states, _ = optimizer_bytes(self.training.optim, self.student.parameters(), self.machine.gpu)
        copies = 8 * sum(p.values for p in self._trained)
        return (copies + self._in_float32(states)) // self.machine.shards("optimizer")

    def _in_float32(self, states: int) -> int:
        trained = self._trained
        return int(states * 4 * sum(p.values for p in trained) / max(sum(p.values * p.width for p in trained), 1))

    @cached_property
    def gradients(self) -> int:
        """The gradients of all trained parameters, on one device."""
        return self._gradient_bytes(self._trained)

    def _gradient_bytes(self, parameters: Iterable[Parameter]) -> int:
        values = sum(p.values * max(p.width, self._master_width) for p in parameters if p.trained)
        return values // self.machine.shards("gradients")

    @cached_property
    def _unreduced(self) -> int:
        """The whole gradients, in the dtype of their reduction, that FSDP2 keeps per device until a step's last micro-batch."""
        if self.machine.engine != "fsdp2" or self.training.accumulation == 1:
            return 0
        return sum(p.values * (2 if self.training.autocast is not None else p.width) for p in self._trained)

    @cached_property
    def _gathered(self) -> int:
        """What a sharding engine gathers: two layers of weights, the ends of the model, one layer of gradients."""
        if self.machine.shards("weights") == 1:
            return 0
        width = 2 if self.training.autocast is not None else 4

        def layer(meta: MetaModel, trained_only: bool = False) -> int:
            return max(
                sum(p.bytes if p.bytes < p.values else p.values * width for p in each if p.trained or not trained_only)
                for each in meta.layers
            )

        ends = sum(p.values * width for p in self.student.outside)
        sharded = [m.meta for m in self.models.frozen if not m.adapter and self._teacher_shards(m) > 1]
        heads = max((meta.head.numel() * width for meta in sharded), default=0)
        own = 2 * layer(self.student) + ends + layer(self.student, trained_only=True)
        return max([own + heads, *(2 * layer(meta) + sum(p.values * width for p in meta.outside) for meta in sharded)])

    # ---- the phases of a step -----------------------------------------------------------------------------------------

    def peak(self) -> Memory:
        """The phase that needs most."""
        return max(self.phases(), key=lambda memory: memory.total)

    def phases(self) -> list[Memory]:
        """All phases of a step."""
        before, after = self.buffers.teacher_outputs  # until the loss, until the end of the backward pass
        (kept, work), hidden, scores = self.buffers.loss, self.buffers.hidden, self.buffers.scores
        forward, first = self._saved + self._cached, self._gradient_bytes(self.student.layers[0])
        head, embedding = gradient_bytes(self.student.head), gradient_bytes(self.student.embedding)
        made = self.gradients - (0 if self.student.tied else embedding)  # the embedding's, unless it is the head's, comes last
        first_layer, last_layer = self._backward(last=False), self._backward(last=True)
        phases = {f"{m.name} runs": self._with(m.tracer.cost(self.teacher_batch).frozen, before) for m in self.models.frozen}
        phases |= {
            "the student runs": self._with(forward + self._highest_layer, before, scores=scores),
            "the loss": self._with(forward, before, loss=kept + work + hidden),
            # the gradients of the loss are scaled, and exist twice meanwhile
            "the backward pass of the loss": self._with(self._saved, after, loss=2 * kept),
            "the backward pass of the last layer": self._with(last_layer, after, scores=scores, gradients=head),
            "the backward pass of the first layer": self._with(first_layer, after, scores=scores, gradients=made - first),
            "the backward pass of the embedding": self._with(hidden + self._cost.shared, after, loss=embedding, gradients=made),
            "the optimizer's step": self._with(0, gradients=self.gradients) + Counter({OPTIMIZER: self._optimizer[1]}),
        }
        if self.stage.loss.on_policy:
            phases["the student writes"] = self.static + self._writes()
        return [Memory(phase, dict(parts)) for phase, parts in phases.items()]

    def _with(self, activations: int, outputs: int = 0, loss: int = 0, scores: int = 0, gradients: int = 0) -> Counter[str]:
        """Static memory and what a phase adds; gradients that are static already do not count twice."""
        added = Counter({ACTIVATIONS: activations, OUTPUTS: outputs, LOSS: loss, SCORES: scores})
        if self.training.accumulation == 1:
            added[GRADIENTS] = gradients
        return self.static + added

    def _writes(self) -> Counter[str]:
        """What a student takes that continues prompts: as many of a buffer's rows as run in one batch."""
        loss, training = self.stage.loss, self.training
        rows = math.ceil(loss.on_policy * training.rows * training.accumulation * loss.rollout_buffer)
        length = max(1, training.length - loss.max_new_tokens)
        prompts = MicroBatch(min(ROLLOUT_BATCH, rows), length, True, training.autocast)
        return writing(self.models.student, prompts, loss.max_new_tokens, self.buffers.compute_width)

    @cached_property
    def _cost(self) -> ModelCost:
        return self.models.student.cost(self.batch)

    @property
    def _highest_layer(self) -> int:
        """What a layer of the student takes in its forward pass beyond what it keeps."""
        if self.training.checkpointing:
            return max(layer.checkpointed - layer.output - layer.cached for layer in self._cost.layers)
        return max(layer.forward - layer.saved for layer in self._cost.layers)

    @cached_property
    def _kept(self) -> list[int]:
        """What each layer keeps for its backward pass."""
        if self.training.checkpointing:
            return [layer.output + layer.stashed for layer in self._cost.layers]
        return [layer.saved for layer in self._cost.layers]

    @cached_property
    def _saved(self) -> int:
        """Activations that live at the end of the student's forward pass."""
        saved = self._cost.ends + self._cost.shared + sum(self._kept)
        return saved if self.training.checkpointing else saved + self.buffers.extra_saved(len(self._kept))

    def _backward(self, last: bool) -> int:
        """Activations in the backward pass of the last layer, or of the first."""
        layers, extra = self._cost.layers, self.buffers.extra_saved
        alive = self.buffers.hidden + self._cost.shared + layers[0].output  # the last is a gradient
        if self.training.checkpointing:  # the forward pass of a layer is run once more
            again = [max(layer.forward, layer.saved + extra(1) + layer.backward) for layer in layers]
            return alive + (sum(self._kept) + max(again) if last else again[0])
        if last:
            return alive + sum(self._kept) + extra(len(layers)) + layers[-1].backward
        return alive + self._kept[0] + extra(1) + layers[0].backward

    @cached_property
    def _cached(self) -> int:
        """Copies of weights that only autocast's cache holds."""
        return sum(layer.cached for layer in self._cost.layers)


def _kept_whole(meta: MetaModel, shards: int) -> int:
    """What each device holds of 4-bit weights beside its part of the packed bytes: the scales of the others."""
    scales = sum(p.bytes - p.values // 2 for p in meta.parameters() if p.bytes < p.values)
    return scales - scales // shards
