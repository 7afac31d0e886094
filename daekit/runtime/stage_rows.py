"""What a stage trains on, and what its rows and its trainer's options are refused for.

Of rows that a model has still to write their form is certain, and how many and how long they are at most: checked before any
training, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel

from daekit.data.mixture import Mixture, require_memory, rows_of_each
from daekit.data.preparation import DomainCount, fit_to_length
from daekit.data.rows import form_of
from daekit.data.teacher_prompts import require_followed
from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.recipe.schema import StageSpec
from daekit.runtime.data import DataBuilder, LossRule, require_an_assistant
from daekit.runtime.generated import GeneratedSource
from daekit.runtime.options import require_metric
from daekit.trainers import DomainSFTConfig, KDConfig
from daekit.trainers.config import cuts_rows, is_evaluated, written_tokens
from daekit.trainers.distributed import is_rank
from daekit.trainers.rollouts import require_prompts


@dataclass(frozen=True)
class PreparedStage:
    """What a stage trains on.

    Attributes:
        arguments: config of its trainer.
        mixture: its training rows, tokenised.
        validation: rows that it is evaluated on while it trains.
        counts: what the length policy does to the training rows, per domain; ``validation_counts`` the same.
        longest: tokens of its longest training row, as it is trained on: cut where the length policy or packing cuts it.
        fitted: the rows to train on, and those to evaluate on if there are, as the length policy leaves them.
    """

    arguments: DomainSFTConfig
    mixture: Mixture
    validation: Dataset | None
    counts: dict[str, DomainCount]
    validation_counts: dict[str, DomainCount]
    longest: int
    fitted: list[Dataset]


def rows_of(data: DataBuilder, stage: StageSpec, arguments: DomainSFTConfig) -> PreparedStage:
    """The rows of a stage under its length policy, and what they are refused for."""
    mixture, splits = data.mixture(stage), cuts_rows(arguments, arguments.packing)
    limit, policy = None if splits else arguments.max_length, arguments.overlong
    teacher_limit = None if stage.type == "sft" else stage.teacher_max_length
    written = written_tokens(arguments)
    rows, counts = fit_to_length(mixture.dataset, limit, policy, "train", teacher_limit, written, data.tokenizer)
    if isinstance(arguments, KDConfig) and arguments.on_policy_fraction:
        require_prompts(rows, arguments, data.tokenizer, None)
    validation, fitted = None, [rows]
    validation_counts: dict[str, DomainCount] = {}
    if is_evaluated(arguments):
        validation = data.validation(stage)
        if validation is None:
            key = "eval_on_start" if arguments.eval_strategy == "no" else "eval_strategy"
            raise UserError(f"{key} needs validation rows; give `validation`, `validation_split` or `holdout` of a source")
        watched, validation_counts = fit_to_length(validation, limit, policy, "eval", teacher_limit, tokenizer=data.tokenizer)
        fitted.append(watched)
    require_metric(arguments, validation_counts)
    if any(rows is not None and TEACHER_PROMPT_IDS in rows.column_names for rows in (mixture.dataset, validation)):
        require_followed(stage.loss, splits)
    longest = max(map(len, rows["input_ids"]))
    longest = min(longest, arguments.max_length or longest)
    return PreparedStage(arguments, mixture, validation, counts, validation_counts, longest, fitted)


def require_other_teacher(stage: StageSpec, ready: PreparedStage) -> None:
    """UserError for a student whose teacher is itself and is told nothing more: the loss is 0 from the first step on."""
    if stage.type == "sft" or stage.loss.ce_weight or not stage.follows_itself:
        return
    if TEACHER_PROMPT_IDS not in ready.mixture.dataset.column_names:
        raise UserError(
            f"{'teacher' if stage.type == 'kd' else 'teachers'}: the student follows itself, as it is before the stage, so the "
            "loss is 0 and nothing is learned; name another model, give rows a teacher_prompt, or set loss.ce_weight"
        )


def notes_on(data: DataBuilder, stage: StageSpec, ready: PreparedStage, student: PreTrainedModel | None) -> Iterator[str]:
    """What a user should know of the rows and options of a stage before its first step."""
    engines = [name for name in ("fsdp", "deepspeed") if getattr(ready.arguments, name)]
    if engines and not is_rank():
        yield f"trainer.{engines[0]} splits the training over processes that accelerate launch or torchrun starts; this is one"
    forms = {name: form_of(data.source(name)[0]) for name in stage.data.sources}
    plain = [name for name, form in forms.items() if form == "prompt+completion"]
    if plain and any(form in ("messages", "conversation pair") for form in forms.values()):
        yield (
            f"the prompts of {', '.join(plain)} are joined as they are, other sources hold conversations; for a chat model set "
            f"sources.{plain[0]}.chat: true"
        )
    knows = student and getattr(student.config.get_text_config(), "max_position_embeddings", None)
    if knows and ready.longest > knows:
        yield f"its longest row has {ready.longest} tokens, more than the {knows} positions that the student was made for"


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
    holdout, most = source.data.recipe.sources[source.name].holdout, most_rows(source)
    if holdout is not None and holdout >= most:
        raise UserError(
            f"sources.{source.name}.holdout: {holdout} of the {most} rows that can be written at most (one for each prompt) "
            "leave none to train on; hold out fewer, or give more prompts"
        )


def require_of_unwritten(
    data: DataBuilder, stage: StageSpec, arguments: DomainSFTConfig, generated: Mapping[str, GeneratedSource]
) -> None:
    """Whether a stage can be trained on the rows that are there and those that are still to be written for it.

    Raises:
        UserError: rows that are, or may be, too long; texts without a prompt for a student that answers prompts; nobody who is
            marked as the assistant; a share that is not one row; more rows than the memory holds.
    """
    limit, rule = None if cuts_rows(arguments, arguments.packing) else arguments.max_length, LossRule.of(stage)
    for name in stage.data.sources:
        if not data.is_unwritten(name):
            rows = data.for_stage(name, stage)[0]
            fit_to_length(rows, limit, arguments.overlong, "train", tokenizer=data.tokenizer)
            continue
        source = generated[name]
        if limit is not None and source.longest > limit and arguments.overlong == "error":
            raise UserError(
                f"a row of the generated source {name!r} may have {source.longest:,} tokens (its longest prompt and "
                f"max_new_tokens), more than trainer.max_length={limit}; lower it, raise max_length, or set overlong"
            )
        form = form_of_written(source)
        require_an_assistant(f"sources.{name}", form, rule)
        if form == "text" and isinstance(arguments, KDConfig) and arguments.on_policy_fraction:
            raise UserError(
                f"on_policy_fraction={arguments.on_policy_fraction:g} (on_policy): the rows of the generated source {name!r} "
                "are texts (prompts: bos), without a prompt that the student could answer. Write them with prompts: self, or "
                "after prompts of rows, or set it to 0"
            )
    unwritten = [generated[name] for name in stage.data.sources if data.is_unwritten(name)]
    # where it is known how many rows there will be, a share must be one row
    if stage.data.weights and (stage.data.rows is not None or all(source.spec.rows is not None for source in unwritten)):
        available = [_available(data, stage, name, generated) for name in stage.data.sources]
        require_memory(stage.data, rows_of_each(stage.data, available), [0] * len(available))


def _available(data: DataBuilder, stage: StageSpec, name: str, generated: Mapping[str, GeneratedSource]) -> int:
    """Rows of a source to train on, at most."""
    if not data.is_unwritten(name):
        return len(data.for_stage(name, stage)[0])
    spec = data.recipe.sources[name]
    left = most_rows(generated[name]) - (spec.holdout or 0)
    return left if spec.limit is None else min(left, spec.limit)
