"""What it takes that a model writes: cached keys and values, the prompts' forward pass, and one pass per token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from daekit.errors import UserError
from daekit.planning.buffers import head_width, key_value_heads
from daekit.planning.meta_model import MetaModel
from daekit.planning.models import ModelPlanner
from daekit.planning.operations import forward_operations
from daekit.planning.trace import MicroBatch, Tracer
from daekit.planning.training import DEFAULTS
from daekit.recipe.generated import GeneratedSpec
from daekit.recipe.schema import STUDENT_AS_IT_WAS, EvaluationSpec, Recipe

# the number of prompts of a generated source (None where its model writes them itself), and the tokens of the longest one
PromptFacts = Callable[[str], tuple[int | None, int]]

KEYS_AND_VALUES, ACTIVATIONS = "cached keys and values", "activations"


@dataclass(frozen=True)
class WritingPlan:
    """Texts that models write outside the steps of a training.

    Attributes:
        what: What they are for: ``answers of the report``.
        models: Names of the models; of the report's those whose shapes are known.
        rows: Rows that each of them writes at most; None where their number is not known before data are read.
        new_tokens: Tokens that are written for a row at most.
        key_value_bytes: Cached keys and values of a batch of the longest rows, of the model that needs most; None where no
            model's shape is known.
        operations: Operations of all rows, all of them that long; None without rows or a model.
        attempts: Attempts at most to get the rows; None where each is a row.
        unread: Why prompts were taken to be ``max_length`` tokens long; empty where they were read.
    """

    what: str
    models: tuple[str, ...]
    rows: int | None
    new_tokens: int
    key_value_bytes: int | None
    operations: float | None
    attempts: int | None = None
    unread: str = ""


def generated_plans(recipe: Recipe, planner: ModelPlanner, prompts: PromptFacts | None = None) -> tuple[WritingPlan, ...]:
    """The plans of the sources that models write: of the rows that are wanted, as if every attempt were one.

    Args:
        prompts: Reads prompts; None: they are not read.
    """
    generated = {name: source.generated for name, source in recipe.sources.items() if source.generated is not None}
    return tuple(_generated_plan(recipe, name, spec, planner, prompts) for name, spec in generated.items())


def _generated_plan(
    recipe: Recipe, name: str, spec: GeneratedSpec, planner: ModelPlanner, prompts: PromptFacts | None
) -> WritingPlan:
    meta = planner.writer(recipe, spec.model) if spec.model.url is None else None
    own_turn = spec.prompts.max_new_tokens if spec.prompts.written == "self" else 0
    count, unread = None, "the prompts were not read"
    if prompts is not None:
        try:
            count, longest = prompts(name)
            unread = ""
        except (UserError, OSError) as error:
            unread = str(error).split("; ")[0]  # what follows is a remedy
    if unread:
        longest = _longest_row(recipe)
    rows, length = spec.rows or count, longest + spec.max_new_tokens
    kept = work = None
    if meta is not None:
        kept = key_value_bytes(meta, spec.batch_size * length)
        if rows is not None:
            work = forward_operations(meta, rows * length, length) + forward_operations(meta, rows * own_turn, own_turn)
    who = (str(spec.model.served_model or spec.model.stage or spec.model.adapter or spec.model.path),)
    attempts = None if spec.rows is None else spec.most_attempts
    return WritingPlan(f"sources.{name}", who, rows, own_turn + spec.max_new_tokens, kept, work, attempts, unread)


def answers_plan(recipe: Recipe, planner: ModelPlanner) -> WritingPlan | None:
    """The plan of the report's answers to validation rows; None if there are none, or no model that would write is known."""
    evaluation = recipe.evaluation
    if evaluation is None or not evaluation.generate:
        return None
    first = next(iter(recipe.stages))
    models = {m.name: planner.writer(recipe, m, first if m.name == STUDENT_AS_IT_WAS else None) for m in evaluation.models}
    metas = {name: meta for name, meta in models.items() if meta is not None}
    if not metas:
        return None
    length, rows = _longest_row(recipe) + evaluation.max_new_tokens, _validation_rows(recipe, evaluation)
    largest = max(key_value_bytes(meta, evaluation.batch_size * length) for meta in metas.values())
    work = None if rows is None else sum(forward_operations(meta, rows * length, length) for meta in metas.values())
    return WritingPlan("answers of the report", tuple(metas), rows, evaluation.max_new_tokens, largest, work)


def _longest_row(recipe: Recipe) -> int:
    return max((DEFAULTS | stage.trainer)["max_length"] or 0 for stage in recipe.stages.values())


def _validation_rows(recipe: Recipe, evaluation: EvaluationSpec) -> int | None:
    """The most rows that are answered; None if a source's number of validation rows is not bounded."""
    rows = 0
    for source in (recipe.sources[name] for name in evaluation.sources):
        bounds = [n for n in (source.holdout, source.validation_limit, evaluation.limit) if n]
        if not source.has_validation:
            continue
        if not bounds:
            return None
        rows += min(bounds)
    return rows


def writing(tracer: Tracer, batch: MicroBatch, new_tokens: int, width: int) -> Counter[str]:
    """The parts of a model that continues prompts, at the step that needs most.

    Args:
        tracer: Its tracer.
        batch: The prompts.
        new_tokens: Tokens that are written at most.
        width: Bytes of a value of keys and values.
    """
    meta, reading, layers = tracer.meta, tracer.cost(batch).frozen, len(tracer.meta.layers)
    prompts = key_value_bytes(meta, batch.rows * batch.length, width)
    last = key_value_bytes(meta, batch.rows * (batch.length + new_tokens), width)
    logits = 2 * 4 * batch.rows * meta.head.shape[0]  # of the last position alone, and their probabilities
    again = last // layers + logits  # each step makes a layer's keys and values anew, one token longer
    if prompts + reading > last + again:
        return Counter({KEYS_AND_VALUES: prompts, ACTIVATIONS: reading})
    return Counter({KEYS_AND_VALUES: last, ACTIVATIONS: again})


def key_value_bytes(meta: MetaModel, tokens: int, width: int | None = None) -> int:
    """Bytes of a model's keys and values; ``width``: of one of them, without mixed precision the model's own."""
    values = 2 * tokens * len(meta.layers) * key_value_heads(meta.config) * head_width(meta.config)
    return values * (width or meta.width)
