"""Attention and hidden-state losses: the student's features against its teachers', compared in the student's own forward."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from daekit.errors import UserError
from daekit.losses.attention import Pass, attention_loss, relation_heads, row_pairs
from daekit.losses.hidden import hidden_loss
from daekit.models.attention_capture import AttentionCall, capture_attention
from daekit.models.backbone import base_of, checkpointed_layers
from daekit.models.features import (
    attention_at_loss_positions,
    capture_hidden,
    feature_spec,
    require_attention,
    require_capturable,
    require_features,
    require_hidden,
)
from daekit.models.sharded import assign, whole
from daekit.protocol import AttentionLayer, Batch, FeatureLayers, Features, Teacher, TeacherOutput
from daekit.recipe.objective import Objective
from daekit.trainers.distributed import refuse_reentrant

ATTENTION_METRIC = "attention_kl"
_PROJECTIONS = "daekit_projections"
_FILE = "hidden_projections.safetensors"
logger = logging.getLogger(__name__)


def feature_weights(objective: Objective) -> dict[str, float]:
    """Metric of attention and hidden-state loss -> its weight."""
    return {ATTENTION_METRIC: objective.attention_weight, f"hidden_{objective.hidden_loss}": objective.hidden_weight}


class FeatureLosses:
    """Attention and hidden-state losses of one student.

    ``spec`` says which features the teacher's outputs must carry; ``seed`` is that of projections onto another width.

    Raises:
        UserError: a teacher without features, or whose layers or heads do not fit.
    """

    def __init__(self, model: nn.Module, objective: Objective, teacher: Teacher, seed: int) -> None:
        self.model, self.objective = model, objective
        self.weights = feature_weights(objective)
        config = base_of(model).config.get_text_config()
        spec = feature_spec(objective, config)
        assert spec is not None, "the objective compares features"
        self.spec, layers = spec, require_features(teacher).feature_layers(spec)
        self.attention_layers = {layer for each in layers for layer in each.attention}
        self.hidden_layers = {layer for each in layers for layer in each.hidden}
        own = FeatureLayers({n: n for n in self.attention_layers}, {n: n for n in self.hidden_layers}, config.hidden_size)
        require_capturable(model, own)  # says what is wrong now and not in the first step
        if objective.attention_layers == "uniform" and 0 < len(self.attention_layers) < config.num_hidden_layers:
            logger.warning("attention_layers=uniform: the layers with softmax attention, %s", sorted(self.attention_layers))
        unequal = {(each.width, layer) for each in layers for layer in each.hidden if each.width != config.hidden_size}
        self.projections = Projections(config.hidden_size, unequal, seed) if unequal else None
        if self.projections is not None:
            self.projections.live_in(model)

    @classmethod
    def of(cls, trainer: Any) -> FeatureLosses | None:
        """Those of a trainer whose teacher is ready; None where its objective has no such losses."""
        objective = trainer.loss_objective
        if not (objective.attention_weight or objective.hidden_weight):
            return None
        refuse_reentrant(trainer)
        losses = cls(trainer.model, objective, trainer.teacher, trainer.args.seed)
        if losses.projections is not None and trainer.optimizer is not None:
            raise UserError(
                "optimizers: an optimizer of your own does not hold the projections that hidden_weight needs for a teacher of "
                "another width, so they would stay random. Leave it out, or set hidden_weight to 0."
            )
        return losses

    @contextmanager
    def compare(self, batch: Batch, outputs: Sequence[TeacherOutput]) -> Iterator[Comparison]:
        """Capture the student's features while it runs on ``batch``; the model is as before on leaving.

        With gradient checkpointing the backward pass runs layers once more: it must be inside, too.
        """
        comparison = Comparison(self, batch, outputs)
        with ExitStack() as stack:
            if self.objective.attention_weight:
                stack.enter_context(capture_attention(self.model, comparison.attention))
            stack.enter_context(capture_hidden(self.model, self.hidden_layers, comparison.hidden))
            yield comparison


class Comparison:
    """The feature losses of one batch: layer by layer while the student runs, then ``losses``."""

    def __init__(self, owner: FeatureLosses, batch: Batch, outputs: Sequence[TeacherOutput]) -> None:
        self.owner, self.batch = owner, batch
        self.wants_gradient = owner.model.training and torch.is_grad_enabled()
        self.checkpointed = checkpointed_layers(owner.model) if self.wants_gradient else set()
        self.positions = [output.positions_M for output in outputs]
        self.teachers = [self._paired(output) for output in outputs]
        self._attention: dict[int, tuple[Tensor, Tensor]] = {}
        self._hidden: dict[int, tuple[Tensor, Tensor]] = {}
        self._checked_masks: set[tuple[int, int | None]] = set()
        self._finished = False

    def losses(self) -> dict[str, Tensor]:
        """The student's layers have run: the weighted sum of the losses as ``loss``, and their values ``[N]`` per position.

        Raises:
            UserError: a layer whose features were not captured.
        """
        owner, objective = self.owner, self.owner.objective
        self._finished = True
        out: dict[str, Tensor] = {"loss": torch.zeros((), device=self.batch.labels_BT.device)}
        if objective.attention_weight:
            require_attention(owner.attention_layers, self._attention)
            _add_mean(self._attention.values(), objective.attention_weight, ATTENTION_METRIC, out)
        if objective.hidden_weight:
            require_hidden(owner.hidden_layers, self._hidden)
            _add_mean(self._hidden.values(), objective.hidden_weight, f"hidden_{objective.hidden_loss}", out)
        if not self.checkpointed:
            self.teachers = []  # no layer is run again: their memory is free for the backward pass
        return out

    def attention(self, call: AttentionCall) -> None:
        """Compare the attention of one layer of the student; called while it runs."""
        if call.layer not in self.owner.attention_layers:
            return
        again = call.layer in self.checkpointed
        if self._finished and not (again and torch.is_grad_enabled()):
            return  # another forward of the student after its loss, for compute_metrics
        self._require_graph()
        run = Pass.GRADIENT if self._finished else Pass.VALUE if again else Pass.BOTH
        student = self._in_heads(attention_at_loss_positions(call, self.batch, self._checked_masks))
        teachers = [(self._in_heads(features.attention[call.layer]), pairs_R8) for features, pairs_R8 in self.teachers]
        loss, value_N = attention_loss(student, teachers, self.batch.layout.offset_N, run)
        if not self._finished:
            heads = student.query_NAD.shape[1]
            self._attention[call.layer] = (loss / heads, value_N / heads)

    def hidden(self, layer: int, hidden_BTH: Tensor) -> None:
        """Compare the hidden states behind one layer of the student; called while it runs."""
        if self._finished:
            return
        self._require_graph()
        hidden_NH = self.batch.at_loss_positions(hidden_BTH)
        loss = torch.zeros((), device=hidden_NH.device)
        projections = self.owner.projections
        if projections is not None:
            # also those whose teacher has no row on this rank: DDP waits for their gradient, and ZeRO adds up gradients in
            # the order in which they come, which must be that of the other ranks. So here, before anything reads them.
            loss = loss + 0 * sum(matrix.sum() for matrix in projections.of_layer(layer))
        value_N = torch.zeros(len(hidden_NH), device=hidden_NH.device)
        for positions_M, (features, _) in zip(self.positions, self.teachers, strict=True):
            teacher_MH = features.hidden_MH[layer]
            width = teacher_MH.shape[1]
            matrix = projections.matrix(width, layer) if projections is not None and width != hidden_NH.shape[1] else None
            part, value_M = hidden_loss(hidden_NH, teacher_MH, positions_M, matrix, self.owner.objective.hidden_loss)
            loss = loss + part
            value_N[positions_M] = value_M.to(value_N.dtype)
        self._hidden[layer] = (loss, value_N)

    def _in_heads(self, layer: AttentionLayer) -> AttentionLayer:
        heads = self.owner.objective.attention_relation_heads
        return layer if heads is None else relation_heads(layer, heads)

    def _paired(self, output: TeacherOutput) -> tuple[Features, Tensor]:
        """The features of an output, and which of its rows is which of the batch's."""
        if output.features is None:
            raise UserError("a teacher's output has no features, as attention_weight and hidden_weight need of every teacher")
        return output.features, row_pairs(self.batch.layout, output.features.layout, output.positions_M)

    def _require_graph(self) -> None:
        """UserError where a layer runs without gradient that will be run again with one: its loss would teach nothing."""
        if self.wants_gradient and not torch.is_grad_enabled():
            raise UserError(
                "reentrant gradient checkpointing runs the layers without gradient, so attention and hidden-state losses would "
                "teach nothing: set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )


def _add_mean(layers: Collection[tuple[Tensor, Tensor]], weight: float, name: str, out: dict[str, Tensor]) -> None:
    """Add the mean over layers of (loss, value per position) to ``out``."""
    out["loss"] = out["loss"] + weight / len(layers) * torch.stack([loss for loss, _ in layers]).sum()
    out[name] = torch.stack([value_N for _, value_N in layers]).mean(0)


class Projections(nn.Module):
    """Learned matrices from the student's width to a wider or narrower teacher's, for the hidden-state loss.

    One in float32, ``[teacher's width, student's width]``, for each (teacher's width, student's layer) of ``wanted``; their
    initial values are uniform, as ``nn.Linear`` has them. They are trained with the student, so they live in it as a submodule
    (the optimizer, DDP and gradient clipping find them there); they are no part of what it is saved as, so its state dict
    leaves them out, and a checkpoint keeps them in a file of their own.
    """

    def __init__(self, width: int, wanted: Iterable[tuple[int, int]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.matrices = nn.ParameterDict()
        for other, layer in sorted(wanted):
            values = torch.empty(other, width).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            self.matrices[f"{other}_{layer}"] = nn.Parameter(values)

    def matrix(self, width: int, layer: int) -> Tensor:
        """The matrix onto a teacher's width for a layer of the student."""
        return self.matrices[f"{width}_{layer}"]

    def of_layer(self, layer: int) -> list[Tensor]:
        """All matrices of a layer of the student."""
        return [matrix for name, matrix in self.matrices.items() if name.endswith(f"_{layer}")]

    def live_in(self, student: nn.Module) -> None:
        """Become a submodule of the student that its state dict does not show."""
        student.add_module(_PROJECTIONS, self.to(next(student.parameters()).device))
        student.register_state_dict_post_hook(_leave_out)
        student.register_load_state_dict_post_hook(_not_missing)

    def save(self, folder: Path, writes: bool) -> None:
        """Write the matrices beside the weights of a checkpoint; every rank must come here, one of them writes."""
        matrices = {name: whole(matrix) for name, matrix in self.matrices.items()}
        if writes:
            save_file(matrices, folder / _FILE)

    def load(self, folder: Path) -> None:
        """Read them back; UserError if they are not there or do not fit."""
        try:
            saved = load_file(folder / _FILE)
            for name, matrix in self.matrices.items():
                assign(matrix, saved[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder / _FILE}: the projections of the hidden-state loss cannot be read ({error})") from error


def forget_projections(student: object) -> None:
    """Remove the projections that an earlier trainer left in a student: nothing trains them, and a copy would hold them."""
    if isinstance(student, nn.Module) and hasattr(student, _PROJECTIONS):
        delattr(student, _PROJECTIONS)


def without_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict that FSDP2 or DeepSpeed has gathered parameter by parameter, without the projections."""
    return {name: tensor for name, tensor in state.items() if f"{_PROJECTIONS}." not in name}


def _leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}{_PROJECTIONS}.")]:
        del state[key]


def _not_missing(_: nn.Module, incompatible: Any) -> None:
    incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if f"{_PROJECTIONS}." not in key]
