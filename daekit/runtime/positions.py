"""Rows that are longer than a model's learned table of positions, in which the training, or the report after it, would fail."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from daekit.errors import UserError
from daekit.models.teacher_view import as_teacher_sees, is_told_more
from daekit.recipe.schema import STUDENT_AS_IT_WAS, EvaluationSpec
from daekit.recipe.validation import dotted
from daekit.runtime.models import ModelBuilder
from daekit.runtime.stage_rows import PreparedStage
from daekit.trainers.config import cuts_rows

_TABLES = ("wpe", "embed_positions", "position_embeddings", "positions_embed")  # GPT-2 and its kin; OPT, BioGPT; BERT's kin


def learned_positions(config: PreTrainedConfig) -> int | None:
    """How many positions a model has learned an embedding for; None where they are computed (rotary, ALiBi, sinusoidal)."""
    if hasattr(config.get_text_config(), "rope_parameters"):
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError:  # its code comes with the checkpoint
        return None
    named = [each for name, each in model.named_modules() if isinstance(each, nn.Embedding) and name.endswith(_TABLES)]
    # OPT and its kin begin behind an offset, RoBERTa and its kin behind the padding
    unused = [getattr(table, "offset", 0 if table.padding_idx is None else table.padding_idx + 1) for table in named]
    return min((table.num_embeddings - first for table, first in zip(named, unused, strict=True)), default=None)


def require_positions(models: ModelBuilder, name: str, ready: PreparedStage) -> None:
    """Compare the rows of a stage with what its student and the teachers that they follow have positions for.

    Raises:
        UserError: a row is longer.
    """
    stage = models.recipe.stages[name]
    known: dict[tuple[str | int, ...], tuple[PreTrainedConfig, int]] = {}
    for key, spec in stage.models().items():
        # an adapter of a teacher runs on the student's base; a student that is made is looked at, not what it is made from
        its_own = key == ("student",) or (key[0] != "student" and spec.adapter is None)
        config = models.config(spec) if its_own else None
        if config is not None and (positions := learned_positions(config)) is not None:
            known[key] = (config, positions)
    if not known:
        return
    longest, seen = _longest(ready, by_teacher=False), _longest(ready, by_teacher=True)
    read: dict[tuple[str | int, ...], int] = {("student",): max(longest.values())}
    for key, teacher in stage.teachers_by_key().items():
        followed = max((seen.get(domain, 0) for domain in stage.domains_of(key, seen)), default=0)
        read |= {(*key, *part): followed for part in teacher.models()}
    for key, (config, positions) in known.items():
        _require(dotted(key), config, positions, read[key], "shorten the row, or lower trainer.max_length and set overlong")


def _longest(ready: PreparedStage, by_teacher: bool) -> dict[str, int]:
    """Domain -> tokens of its longest row, as the student or its teacher sees it; packing that cuts rows lays it in blocks."""
    longest: dict[str, int] = {}
    block = ready.arguments.max_length if cuts_rows(ready.arguments, ready.arguments.packing) else None
    for row in chain(*ready.fitted):
        tokens = len((as_teacher_sees(row) if by_teacher and is_told_more(row) else row)["input_ids"])
        longest[row["domain"]] = max(longest.get(row["domain"], 0), min(tokens, block or tokens))
    return longest


def require_report_positions(models: ModelBuilder, evaluation: EvaluationSpec) -> None:
    """The same of the rows that a report scores and the answers that it has written.

    Raises:
        UserError: a row, or a prompt with ``max_new_tokens`` behind it, is longer.
    """
    rows = [row for each in models.data.evaluation_sets.values() for row in each.rows]
    scored = max(len(row.input_ids) for row in rows)
    prompts = [len(row.prompt_ids) for row in rows if row.prompt_ids] if evaluation.generate else []
    first, new = next(iter(models.recipe.stages)), evaluation.max_new_tokens
    for each in evaluation.models:
        config = models.config(models.student_spec(first) if each.name == STUDENT_AS_IT_WAS else each)
        if config is not None and (positions := learned_positions(config)) is not None:
            _require(f"models.{each.name}", config, positions, scored, "shorten the longest validation row")
            if prompts:
                remedy = f"lower max_new_tokens={new}, or set generate: false"
                _require(f"models.{each.name}", config, positions, max(prompts) + new, remedy)


def _require(key: str, config: PreTrainedConfig, positions: int, tokens: int, remedy: str) -> None:
    if tokens > positions:
        raise UserError(
            f"{key}: a {config.model_type} model has learned {positions} positions, and is to read {tokens} tokens; {remedy}"
        )
