"""What a stage trains on: its rows under their length policy, and what they and its trainer's options are refused for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedModel

from daekit.data.mixture import Mixture
from daekit.data.preparation import DomainCount, fit_to_length
from daekit.data.rows import form_of
from daekit.data.teacher_prompts import require_followed
from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.recipe.schema import StageSpec
from daekit.runtime.data import DataBuilder, LossRule
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
    """

    arguments: DomainSFTConfig
    mixture: Mixture
    validation: Dataset | None
    counts: dict[str, DomainCount]
    validation_counts: dict[str, DomainCount]
    longest: int


def rows_of(stage: StageSpec, arguments: DomainSFTConfig, data: DataBuilder) -> PreparedStage:
    """The rows of a stage under its length policy, and what they are refused for."""
    mixture = data.mixture(stage)
    splits = cuts_rows(arguments, arguments.packing)
    limit = None if splits else arguments.max_length
    teacher_limit = None if stage.type == "sft" else stage.teacher_max_length
    written, policy = written_tokens(arguments), arguments.overlong
    rows, counts = fit_to_length(mixture.dataset, limit, policy, "train", teacher_limit, written, data.tokenizer)
    if isinstance(arguments, KDConfig) and arguments.on_policy_fraction:
        require_prompts(rows, arguments, data.tokenizer, None)
    watched = is_evaluated(arguments)
    validation = data.validation(stage) if watched else None
    if watched and validation is None:
        key = "eval_on_start" if arguments.eval_strategy == "no" else "eval_strategy"
        raise UserError(f"{key} needs validation rows; give `validation`, `validation_split` or `holdout` of a source")
    validation_counts = {}
    if validation is not None:
        validation_counts = fit_to_length(validation, limit, policy, "eval", teacher_limit, tokenizer=data.tokenizer)[1]
    if isinstance(arguments, KDConfig) and (selection := arguments.selection()) is not None:
        selection.require_domains(validation_counts)
    require_metric(arguments, validation_counts)
    if any(rows is not None and TEACHER_PROMPT_IDS in rows.column_names for rows in (mixture.dataset, validation)):
        require_followed(stage.loss, splits)
    longest = max(len(row) for row in mixture.dataset["input_ids"])
    longest = min(longest, arguments.max_length or longest)
    return PreparedStage(arguments, mixture, validation, counts, validation_counts, longest)


def require_other_teacher(stage: StageSpec, ready: PreparedStage) -> None:
    """UserError for a student whose teacher is itself and is told nothing more: the loss is 0 from the first step on."""
    if stage.type == "sft" or stage.loss.ce_weight or not stage.follows_itself:
        return
    if TEACHER_PROMPT_IDS not in ready.mixture.dataset.column_names:
        raise UserError(
            f"{'teacher' if stage.type == 'kd' else 'teachers'}: the student follows itself, as it is before the stage, so the "
            "loss is 0 and nothing is learned; name another model, give rows a teacher_prompt, or set loss.ce_weight"
        )


def require_room(stage: StageSpec, arguments: DomainSFTConfig, data: DataBuilder, longest: Mapping[str, int]) -> None:
    """Check the rows of a stage that are there, and whether those that are still to be written may be too long for it."""
    limit = None if cuts_rows(arguments, arguments.packing) else arguments.max_length
    for name in stage.data.sources:
        if name not in longest:
            rows = data.tokenized(name, LossRule.of(stage), stage.type != "sft")[0]
            fit_to_length(rows, limit, arguments.overlong, "train", tokenizer=data.tokenizer)
        elif limit is not None and longest[name] > limit and arguments.overlong == "error":
            raise UserError(
                f"a row of the generated source {name!r} may have {longest[name]:,} tokens (its longest prompt and "
                f"max_new_tokens), more than trainer.max_length={limit}; lower it, raise max_length, or set overlong"
            )


def notes_on(stage: StageSpec, ready: PreparedStage, data: DataBuilder, student: PreTrainedModel | None) -> Iterator[str]:
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
