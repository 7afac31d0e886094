"""Is the expert of each domain better there than the student of a dae stage? Asked on held-out rows, before the first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues, interval, paired_interval
from daekit.models.heads import teacher_log_probs
from daekit.models.teacher_view import TEACHER_PROMPT_IDS, TOKEN_COLUMNS
from daekit.protocol import Batch, TeacherOutput
from daekit.recipe.schema import DAEStage
from daekit.runtime.data import DataBuilder
from daekit.runtime.models import ModelBuilder
from daekit.teachers.adapter import current_outputs
from daekit.teachers.cache.asking import PAD_TO, padded_batch
from daekit.teachers.cache.rows import rows_of_examples
from daekit.trainers import KDTrainer
from daekit.trainers.distributed import rounding

ROWS = 64  # of each domain at most
_SECONDS = 60.0  # for all domains together; no row is begun after it
_BATCH = 8
_CHUNK = 256  # positions whose log-probabilities are there at a time
_ROUNDS = 1000  # of the bootstrap
Ask = Callable[[Batch], list[TeacherOutput]]
Row = Mapping[str, Any]  # tokenised


def held_out_rows(data: DataBuilder, name: str) -> dict[str, list[Row]]:
    """Domain -> validation rows on which its expert is compared with the student; a cache of the expert holds them, too."""
    stage = data.recipe.stages[name]
    if not isinstance(stage, DAEStage) or not stage.preflight or (validation := data.validation(stage)) is None:
        return {}
    longest = stage.trainer.get("max_length", 1024)
    return {domain: _some(validation, domain, longest) for domain, each in stage.teachers.items() if each.kind != "labels"}


def _some(rows: Dataset, domain: str, longest: int | None) -> list[Row]:
    """``ROWS`` rows of a domain, spread over all that are short enough."""
    columns = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    mine = (each for each in rows.select_columns(columns).with_format("numpy") if each["domain"] == domain)
    fit = [row for row in mine if (row["labels"][1:] >= 0).any() and (longest is None or len(row["input_ids"]) <= longest)]
    return [fit[index] for index in np.unique(np.linspace(0, len(fit) - 1, min(ROWS, len(fit)), dtype=int))]


def compare_experts(models: ModelBuilder, name: str, trainer: KDTrainer) -> tuple[dict[str, Any], list[str]]:
    """(domain -> figures, JSON-able; what to print) of the experts of a dae stage that is about to begin. Every rank calls it.

    All ranks score the same rows, because teachers may be split over them. A stage that is resumed is not asked again.
    """
    spec = models.recipe.stages[name]
    if not isinstance(spec, DAEStage) or not spec.preflight or models.folder.stage(name).checkpoints:
        return {}, []
    found: dict[str, Any] = {}
    rows_of, start = held_out_rows(models.data, name), time.perf_counter()
    for domain in [domain for domain, each in spec.teachers.items() if each.kind != "labels"]:
        why = _not_scored(trainer, rows_of.get(domain, []))
        found[domain] = {"not_scored": why} if why else _compare(trainer, spec, domain, rows_of[domain], start)
    return found, [line for domain, figures in found.items() for line in _lines(name, domain, figures)]


def _not_scored(trainer: KDTrainer, rows: Sequence[Row]) -> str | None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return "the student is spread over the processes only when its training begins"
    return None if rows else "it has no validation rows within max_length (`validation` or `holdout` of a source)"


def _compare(trainer: KDTrainer, spec: DAEStage, domain: str, rows: Sequence[Row], start: float) -> dict[str, Any]:
    routes = trainer.teacher.routes
    asked: dict[str, Ask] = {
        "expert": routes[domain].outputs,
        "student": lambda batch: current_outputs(trainer.model, batch, trainer.vocab_size),
    }
    if spec.reference is not None and spec.reference.kind not in ("student", "labels"):
        asked["reference"] = routes[spec.reference_domains[0]].outputs
    scores: dict[str, list[tuple[float, int]]] = {who: [] for who in asked}
    reasons: dict[str, str] = {}
    for first in range(0, len(rows), _BATCH):
        if first and _is_late(trainer, start):
            break
        part = rows[first : first + _BATCH]
        told = _batch(part, domain, trainer.accelerator.device)
        own = _batch([dict(row) | {TEACHER_PROMPT_IDS: None} for row in part], domain, trainer.accelerator.device)
        for who in [who for who in asked if who not in reasons]:
            try:
                with rounding(trainer.accelerator), torch.no_grad():
                    batch = told if who == "expert" else own
                    scores[who] += _nll(asked[who](batch), batch)
            except UserError as error:  # a cache without these rows, a server that is gone
                reasons[who] = str(error)
    if "expert" in reasons:
        return {"not_scored": reasons["expert"]}
    values = {who: RowValues(*np.array(each, dtype=np.float64).T) for who, each in scores.items() if who not in reasons}
    figures: dict[str, Any] = {who: [each.mean, *interval(each, _ROUNDS, 0)] for who, each in values.items()}
    student, expert = values["student"], values["expert"]
    better = [student.mean - expert.mean, *paired_interval(student, expert, _ROUNDS, 0)]
    sizes = {"rows": len(student.weight_R), "tokens": int(student.weight_R.sum())}
    return figures | sizes | {"better_by": better} | ({"reference_not_scored": reasons["reference"]} if reasons else {})


def _batch(examples: Sequence[Row], domain: str, device: torch.device) -> Batch:
    """Rows as their teacher sees them, padded as a cache pads them."""
    rows = list(rows_of_examples(examples))
    batch = padded_batch(rows, -(-max(len(row.input_ids) for row in rows) // PAD_TO) * PAD_TO, device)
    return replace(batch, domains=(domain,) * len(rows))


def _is_late(trainer: KDTrainer, start: float) -> bool:
    late = torch.tensor(float(time.perf_counter() - start > _SECONDS), device=trainer.accelerator.device)
    return bool(trainer.accelerator.reduce(late, "sum") > 0)


def _nll(outputs: Sequence[TeacherOutput], batch: Batch) -> list[tuple[float, int]]:
    """(NLL in nats, loss tokens) of each row.

    Raises:
        UserError: a sparse distribution that does not name the label, as drawn tokens do not.
    """
    nll_N = torch.zeros(batch.labels_N.numel(), dtype=torch.float64)
    for output in outputs:
        labels_M = batch.labels_N[output.positions_M]
        if output.top_k is not None:
            named_MK = output.top_k.ids_MK == labels_M[:, None]
            if not named_MK.any(-1).all():
                raise UserError("its sparse distributions do not name every label")
            log_probs_M = output.top_k.log_probs_MK.double().masked_fill(~named_MK, 0.0).sum(-1)
        else:
            chunks = range(0, len(labels_M), _CHUNK)
            parts = [teacher_log_probs(output, slice(i, i + _CHUNK)).gather(-1, labels_M[i : i + _CHUNK, None]) for i in chunks]
            log_probs_M = torch.cat([part[:, 0] for part in parts])
        nll_N[output.positions_M.cpu()] = -log_probs_M.double().cpu()
    row_N = batch.row_N.cpu()
    sums = torch.zeros(len(batch.domains), dtype=torch.float64).index_add_(0, row_N, nll_N)
    return list(zip(sums.tolist(), torch.bincount(row_N, minlength=len(batch.domains)).tolist(), strict=True))


def _lines(name: str, domain: str, figures: Mapping[str, Any]) -> list[str]:
    if "not_scored" in figures:
        return [f"[{name}] preflight: the expert of {domain} is not scored: {figures['not_scored']}"]
    lines = [f"[{name}] preflight on {figures['rows']} held-out rows of {domain} ({figures['tokens']:,} loss tokens), NLL:"]
    lines += [f"    {who:<10} {_shown(figures[who])}" for who in ("expert", "student", "reference") if who in figures]
    if why := figures.get("reference_not_scored"):
        lines.append(f"    reference  not scored: {why}")
    return lines + [f"    WARNING: {each}" for each in warnings({domain: figures})]


def warnings(preflight: Mapping[str, Any]) -> list[str]:
    """What a log and a report must say of experts that are not better than the student; none where all are."""
    return [
        f"the expert of {domain} is not better than the student on held-out rows of its own domain: its NLL is "
        f"{_shown(figures['expert'])} nats per token, the student's {_shown(figures['student'])}, better by "
        f"{_shown(figures['better_by'])}. By these labels the student has nothing to gain from it: give another, or `labels`."
        for domain, figures in preflight.items()
        if "better_by" in figures and not figures["better_by"][1] > 0
    ]


def _shown(figures: Sequence[float]) -> str:
    return "{:.3f} [{:.3f}, {:.3f}]".format(*figures)
