"""What is certain of rows that a model has still to write: their form, and how many they are. Checked before any training."""

from __future__ import annotations

import json
from collections.abc import Mapping

from daekit.data.mixture import require_memory, rows_of_each
from daekit.errors import UserError
from daekit.recipe.schema import StageSpec
from daekit.runtime.data import DataBuilder, LossRule, require_an_assistant
from daekit.runtime.generated import GeneratedSource
from daekit.trainers import DomainSFTConfig, KDConfig


def form_of_written(source: GeneratedSource) -> str:
    """The form that its rows will have, in the words of ``daekit.data.rows.form_of``."""
    written = source.spec.prompts.written
    if written is not None:
        return "text" if written == "bos" else "conversation pair"
    return "conversation pair" if isinstance(source.prompts[0]["prompt"], list) else "prompt+completion"


def most_rows(source: GeneratedSource) -> int:
    """Rows at most; with ``rows`` exactly so many, for fewer are an error."""
    spec = source.spec
    if spec.rows is not None:
        return spec.rows
    if spec.temperature or spec.model.url is not None:
        return len(source.prompts)
    return len({json.dumps(prompt, sort_keys=True) for prompt in source.prompts})  # duplicates are dropped


def require_rows_to_train_on(source: GeneratedSource) -> None:
    """UserError for a ``holdout`` that leaves none of the rows that can be written."""
    holdout, most = source.recipe.sources[source.name].holdout, most_rows(source)
    if holdout is not None and holdout >= most:
        raise UserError(
            f"sources.{source.name}.holdout: {holdout} of the {most} rows that can be written at most (one for each prompt) "
            "leave none to train on; hold out fewer, or give more prompts"
        )


def require_of_unwritten(
    stage: StageSpec, arguments: DomainSFTConfig, data: DataBuilder, waits: Mapping[str, GeneratedSource]
) -> None:
    """Whether a stage can be trained on the rows that are still to be written for it.

    Raises:
        UserError: texts without a prompt for a student that answers prompts; nobody who is marked as the assistant; a share
            that is not one row; more rows than the memory holds.
    """
    rule = LossRule.of(stage)
    for name in [name for name in stage.data.sources if name in waits]:
        form = form_of_written(waits[name])
        require_an_assistant(f"sources.{name}", form, rule)
        if form == "text" and isinstance(arguments, KDConfig) and arguments.on_policy_fraction:
            raise UserError(
                f"on_policy_fraction={arguments.on_policy_fraction:g} (on_policy): the rows of the generated source {name!r} "
                "are texts (prompts: bos), without a prompt that the student could answer. Write them with prompts: self, or "
                "after prompts of rows, or set it to 0"
            )
    _require_shares(stage, data, rule, waits)


def _require_shares(stage: StageSpec, data: DataBuilder, rule: LossRule, waits: Mapping[str, GeneratedSource]) -> None:
    """UserError for a share that is not one row, where it is known how many rows there will be."""
    exact = all(source.spec.rows is not None for name, source in waits.items() if name in stage.data.sources)
    if not stage.data.weights or not (exact or stage.data.rows is not None):
        return
    available = []
    for name in stage.data.sources:
        if name not in waits:
            available.append(len(data.tokenized(name, rule, stage.type != "sft")[0]))
            continue
        spec = waits[name].recipe.sources[name]
        left = most_rows(waits[name]) - (spec.holdout or 0)
        available.append(left if spec.limit is None else min(left, spec.limit))
    require_memory(stage.data, rows_of_each(stage.data, available), [0] * len(available))
