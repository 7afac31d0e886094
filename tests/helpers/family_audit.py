"""What holds for a family: each loss of its tiny model beside the truth from the model's own logits and maps, in float64.

``python -m tests.helpers.family_audit`` writes the table of ``docs/families.md`` from what has run.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from daekit.errors import UserError
from daekit.losses import prediction_loss
from daekit.models.backbone import add_on_hidden, checkpointed_layers
from daekit.models.features import softmax_layers
from daekit.models.heads import output_head
from daekit.models.start_checks import require_plain_head, require_rows_apart
from daekit.protocol import Batch, packed_lengths
from daekit.recipe.objective import Objective
from daekit.teachers import ModelTeacher
from daekit.trainers.features import FeatureLosses
from tests import reference
from tests.helpers import families
from tests.helpers.families import V

COLUMNS = ("prediction", "packed rows", "attention", "hidden states", "checkpointing")
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_TOLERANCE = 1e-5  # relative; norms of most families run in float32 even in a float64 model
_IDS, _LENGTHS = 3 + torch.arange(21) * 11 % (V - 3), (8, 13)  # no special token: their embeddings may be 0
_ROWS = _IDS.split(_LENGTHS)
Sums = tuple[Tensor, Tensor]  # a loss and all gradients of the student, as one vector


def audit(family: str) -> dict[str, str]:
    """Column -> ``exact``, or ``refused: `` and why.

    Raises:
        AssertionError: a loss or gradient that is neither the truth nor refused.
    """
    checks = (_prediction, _packed, _attention, _hidden, _checkpointing)
    return {column: _outcome(check, family) for column, check in zip(COLUMNS, checks, strict=True)}


def _outcome(check: Callable[[str], list[tuple[Sums, Sums]]], family: str) -> str:
    try:
        compared = check(family)
    except UserError as error:
        return f"refused: {_reason(str(error))}"
    for (loss, gradient), (true_loss, true_gradient) in compared:
        for ours, truth in ((loss, true_loss), (gradient, true_gradient)):
            error = float((ours - truth).norm() / truth.norm())
            assert error < _TOLERANCE, f"{family}: {check.__name__} is off by {error:.2g}"
    return "exact"


_REASONS = {
    "packed rows see each other": "rows see each other",
    "does not run packed rows": "does not run packed rows",
    "several streams": "several streams of hidden states (AltUp)",
    "attention sinks": "sinks",
    "soft-capped": "soft-capped scores",
    "ALiBi": "ALiBi",
    "no softmax layer": "no softmax layer",
    "works with attn_implementation": "no SDPA in transformers",
    "its mask is not causal": "a mask of its own",
    "never called": "code of its own",
    "did not run": "layers that run only with images",
    "not its output head": "a head of its own",
}


def _reason(message: str) -> str:
    return next(reason for sign, reason in _REASONS.items() if sign in message)


def _pair(family: str, **fields: Any) -> tuple[Any, ModelTeacher]:
    student = families.model(family, seed=1, **fields)
    teacher = families.model(family, seed=2, **fields)
    for model in (student, teacher):
        _eager_experts(model)
    add_on_hidden(student)
    require_plain_head(student, V)
    return student, ModelTeacher(teacher, V)


def _eager_experts(model: Any) -> None:
    try:
        model.set_experts_implementation("eager")  # grouped products know no float64
    except (ValueError, AttributeError):
        return


def _batch(packed: bool) -> Batch:
    """Two rows: padded on the right, or one after the other in one sequence. A third of the tokens carries no loss."""
    labels = [row.masked_fill((torch.arange(len(row)) % 3 == 2) | (torch.arange(len(row)) == 0), -100) for row in _ROWS]
    if packed:
        positions = torch.cat([torch.arange(length) for length in _LENGTHS])[None]
        rows = torch.repeat_interleave(torch.arange(2), torch.tensor(_LENGTHS))[None]
        inputs = {"input_ids": _IDS[None], "position_ids": positions} | packed_lengths(positions)
        return Batch(inputs, torch.cat(labels)[None], rows, ("a", "b"))
    longest = max(_LENGTHS)
    mask = torch.stack([(torch.arange(longest) < length).long() for length in _LENGTHS])

    def padded(parts: Iterable[Tensor], value: int) -> Tensor:
        return torch.stack([torch.nn.functional.pad(part, (0, longest - len(part)), value=value) for part in parts])

    inputs = {"input_ids": padded(_ROWS, 0), "attention_mask": mask}
    return Batch(inputs, padded(labels, -100), torch.where(mask > 0, torch.arange(2)[:, None], -1), ("a", "b"))


def _sums(loss: Tensor, model: Any) -> Sums:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    vector = [(torch.zeros_like(p) if g is None else g).double().flatten() for p, g in zip(parameters, gradients, strict=True)]
    return loss.detach().double(), torch.cat(vector)


# ---- ours -------------------------------------------------------------------------------------------------------------------


def _ours(student: Any, teacher: ModelTeacher, batch: Batch, **weights: Any) -> Sums:
    """The loss as the trainers make it: features captured in the student's forward, all of it summed inside."""
    objective = Objective.of({"ce_weight": 0.5, "prediction_weight": 1.0} | weights)
    wanted = objective.attention_weight or objective.hidden_weight
    features = FeatureLosses(student, objective, teacher, seed=0) if wanted else None
    with torch.no_grad():
        outputs = teacher.outputs(batch, features.spec if features else None)
    with features.compare(batch, outputs) if features else nullcontext() as comparison:

        def summed(found: Any) -> Tensor:
            hidden_NH = batch.at_loss_positions(found.last_hidden_state)
            loss = prediction_loss(hidden_NH, output_head(student, V), batch.labels_N, outputs, objective).loss
            return loss if comparison is None else loss + comparison.losses()["loss"]

        return _sums(student(**batch.inputs, on_hidden=summed), student)


def _prediction(family: str) -> list[tuple[Sums, Sums]]:
    student, teacher = _pair(family)
    return [(_ours(student, teacher, _batch(packed=False)), _sums(_true_prediction(student, teacher), student))]


def _packed(family: str) -> list[tuple[Sums, Sums]]:
    student, teacher = _pair(family)
    truth = _sums(_true_prediction(student, teacher), student)
    try:
        require_rows_apart(student, "student")
    except UserError:
        with suppress(ValueError):  # the model's own refusal
            wrong = _ours(student, teacher, _batch(packed=True))[1] - truth[1]
            assert wrong.norm() > 1e-3 * truth[1].norm(), f"{family}: packed rows are refused without need"
        raise
    return [(_ours(student, teacher, _batch(packed=True)), truth)]


def _attention(family: str) -> list[tuple[Sums, Sums]]:
    student, teacher = _pair(family)
    ours = _ours(student, teacher, _batch(packed=False), attention_weight=1.0)
    truth = _true_prediction(student, teacher) + _true_attention(student, teacher)
    return [(ours, _sums(truth, student))]


def _hidden(family: str) -> list[tuple[Sums, Sums]]:
    student, teacher = _pair(family)
    ours = _ours(student, teacher, _batch(packed=False), hidden_weight=1.0, hidden_layers=((0, 0),))
    _ours(student, teacher, _batch(packed=False), hidden_weight=1.0)  # and every layer can be captured
    return [(ours, _sums(_true_prediction(student, teacher) + _true_hidden(student, teacher), student))]


def _checkpointing(family: str) -> list[tuple[Sums, Sums]]:
    """All losses that the family has, with checkpointing and without."""
    student, teacher = _pair(family)
    weights: dict[str, Any] = {}
    for name in ("attention_weight", "hidden_weight"):
        try:
            _ours(student, teacher, _batch(packed=False), **{name: 1.0})
            weights[name] = 1.0
        except UserError:
            continue
    plain = _ours(student.train(), teacher, _batch(packed=False), **weights)
    student.gradient_checkpointing_enable({"use_reentrant": False})
    assert checkpointed_layers(student), f"{family}: no layer is checkpointed"
    objective = Objective.of({"ce_weight": 0.5, "prediction_weight": 1.0} | weights)
    return [(_checkpointed(student, teacher, objective), plain)]


def _checkpointed(student: Any, teacher: ModelTeacher, objective: Objective) -> Sums:
    return _ours(student, teacher, _batch(packed=False), **objective.model_dump(exclude_unset=True))


# ---- the truth --------------------------------------------------------------------------------------------------------------


def _loss_positions(row: Tensor) -> Tensor:
    """The positions of a row that predict a token with a label."""
    after = torch.arange(1, len(row))
    return after[(after % 3) != 2] - 1


def _true_prediction(student: Any, teacher: ModelTeacher) -> Tensor:
    """0.5 CE + KL(teacher || student), row by row, from the models' own logits."""
    total = torch.zeros((), dtype=torch.float64)
    for row in _ROWS:
        at = _loss_positions(row)
        ours = student(input_ids=row[None], use_cache=False).logits[0, at, :V].double()
        with torch.no_grad():
            theirs = teacher.model(input_ids=row[None], use_cache=False).logits[0, at, :V].double()
        total = total + reference.loss(ours, row[at + 1], theirs.softmax(-1), "forward_kl", 0.5, 1.0, 0.5, 1.0)
    return total


def _maps(model: Any, row: Tensor) -> list[Tensor]:
    """``[A, T, T]`` of each softmax layer, as the model itself materialises them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        maps = model(input_ids=row[None], use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(before)
    layers = softmax_layers(model.config.get_text_config())
    found = [each[0].double() for each in maps if each is not None]
    return found if len(found) == len(layers) else [maps[layer][0].double() for layer in layers]


def _true_attention(student: Any, teacher: ModelTeacher) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row in _ROWS:
        at, ours = _loss_positions(row), _maps(student, row)
        with torch.no_grad():
            theirs = _maps(teacher.model, row)
        for mine, yours in zip(ours, theirs, strict=True):
            total = total + reference.attention_kl(yours, mine)[at].sum() / len(mine) / len(ours)
    return total


def _true_hidden(student: Any, teacher: ModelTeacher) -> Tensor:
    """Of the first layer; the Mamba models leave the embeddings out of their list."""
    first = 0 if student.config.model_type.startswith(("mamba", "falcon_mamba")) else 1
    total = torch.zeros((), dtype=torch.float64)
    for row in _ROWS:
        at = _loss_positions(row)
        ours = student(input_ids=row[None], use_cache=False, output_hidden_states=True).hidden_states[first]
        with torch.no_grad():
            theirs = teacher.model(input_ids=row[None], use_cache=False, output_hidden_states=True).hidden_states[first]
        total = total + reference.hidden_distance("cosine", ours[0, at], theirs[0, at], None).sum()
    return total


# ---- the page ---------------------------------------------------------------------------------------------------------------


def rows_of_page() -> dict[str, dict[str, str]]:
    """Family -> column -> what the table of the page says."""
    cells = [[cell.strip() for cell in line.strip("|\n ").split("|")] for line in PAGE.read_text().splitlines() if "|" in line]
    return {family.strip("`"): dict(zip(COLUMNS, rest, strict=True)) for family, *rest in cells if family.startswith("`")}


def _write() -> None:
    logging.disable()
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in sorted([*families.FAMILIES, *families.WITH_VISION]):
        lines.append(f"| `{family}` | {' | '.join(audit(family).values())} |")
        print(lines[-1], flush=True)
    text = re.sub(r"\| family \|.*?(?=\n\n|\Z)", "\n".join(lines), PAGE.read_text(), flags=re.DOTALL)
    PAGE.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    _write()
