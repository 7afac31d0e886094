"""One model on every evaluation set: likelihood, generated answers and distance to its teachers, row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.data.tokenize import TokenizedRow
from daekit.evaluation.intervals import RowValues, interval
from daekit.evaluation.matching import answer_match, exact_match, rouge_l
from daekit.evaluation.sets import EvaluationSet
from daekit.generation.local import generate
from daekit.models.scoring import score_rows
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.models.vocabulary import vocabulary_size
from daekit.protocol import Teacher
from daekit.recipe.schema import EvaluationSpec
from daekit.report.contents import Row

SEED = 0  # of the resamples: equal for all models, so that differences are paired
Key = tuple[str, str, str]  # domain, source, metric


@dataclass(frozen=True)
class ModelEvaluation:
    """What was measured of one model, row by row, so that models can be compared on the same rows.

    Attributes:
        values: (domain, source, metric) -> values of the source's rows, in their order.
        generated: source -> the text generated for each row that has a prompt.
    """

    model: str
    values: dict[Key, RowValues] = field(default_factory=dict)
    generated: dict[str, list[str]] = field(default_factory=dict)

    def by_domain(self) -> dict[tuple[str, str, str], RowValues]:
        """(domain, label, metric) -> values. The label is the domain for all its sources together and, if it has
        several, ``domain/source`` for each."""
        sources: dict[tuple[str, str], dict[str, RowValues]] = {}
        for (domain, source, metric), values in self.values.items():
            sources.setdefault((domain, metric), {})[source] = values
        found = {}
        for (domain, metric), parts in sources.items():
            found[domain, domain, metric] = RowValues(
                np.concatenate([part.total_R for part in parts.values()]),
                np.concatenate([part.weight_R for part in parts.values()]),
            )
        pairs = {(domain, source) for domain, source, _ in self.values}
        several = {domain for domain, source in pairs if any(d == domain and s != source for d, s in pairs)}
        for (domain, source, metric), values in self.values.items():
            if domain in several:
                found[domain, f"{domain}/{source}", metric] = values
        return found

    def rows(self, rounds: int) -> list[Row]:
        """One report row per label and metric, with 95 % intervals from ``rounds`` resamples."""
        rows = []
        for (_, label, metric), values in self.by_domain().items():
            low, high = interval(values, rounds, SEED)
            size = len(values.total_R)
            rows.append(Row(self.model, label, metric, values.mean, low, high, size))
            if metric == "nll":  # exp is monotonic: the interval's ends carry over exactly
                value, low, high = exponential(values.mean), exponential(low), exponential(high)
                rows.append(Row(self.model, label, "perplexity", value, low, high, size))
        return rows


def evaluate_model(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, EvaluationSet],
    *,
    spec: EvaluationSpec,
    teachers: Mapping[str, PreTrainedModel | Teacher] | None = None,
    reference: Teacher | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> ModelEvaluation:
    """Measure ``model`` on every set.

    Args:
        name: name of the model in the report.
        model: a causal language model, or a PEFT model around one, on the device that it is to run on.
        sets: source name -> its tokenised validation rows.
        spec: ``generate``, ``max_new_tokens`` and ``batch_size`` are read.
        teachers: domain -> the teacher that KL is measured to; domains without one have no ``kl_to_teacher``.
        reference: what ``kl_to_reference`` is measured to on every domain: how far the model went from there.
        progress: called with what is being measured and (rows done, all of them), now and then.
    """

    def shown(what: str) -> Callable[[int, int], None] | None:
        return partial(progress, what) if progress is not None else None

    evaluation = ModelEvaluation(name)
    for source, evaluation_set in sets.items():
        domain, rows = evaluation_set.domain, evaluation_set.rows
        teacher = (teachers or {}).get(domain)
        measure = partial(_likelihood, model, tokenizer, rows=rows, batch_size=spec.batch_size, domain=domain)
        # how far the model went from the reference is asked about the same tokens, whatever a teacher is told beside
        against_reference = partial(measure, teacher=reference, rows=[replace(row, teacher_prompt_ids=None) for row in rows])
        if reference is not None and teacher is None:  # the model itself runs once
            likelihood = against_reference(progress=shown(f"{source}, likelihood"))
            likelihood["kl_to_reference"] = likelihood.pop("kl_to_teacher")
        else:
            likelihood = measure(teacher=teacher, progress=shown(f"{source}, likelihood"))
            if reference is not None:
                same = reference is teacher and all(row.teacher_prompt_ids is None for row in rows)
                found = likelihood if same else against_reference(progress=shown(f"{source}, reference"))
                likelihood["kl_to_reference"] = found["kl_to_teacher"]
        evaluation.values.update({(domain, source, metric): values for metric, values in likelihood.items()})
        if not spec.generate:
            continue
        answered = [row for row in rows if row.prompt_ids is not None]
        if not answered:
            continue
        texts = _answers(model, tokenizer, answered, spec, shown(f"{source}, answers"))
        evaluation.generated[source] = texts
        evaluation.values.update({(domain, source, metric): v for metric, v in _matches(answered, texts).items()})
    return evaluation


def exponential(value: float) -> float:
    """``exp``, and infinity where it would overflow."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    batch_size: int,
    teacher: PreTrainedModel | Teacher | None,
    domain: str,
    progress: Callable[[int, int], None] | None,
) -> dict[str, RowValues]:
    scores = score_rows(
        model,
        [{"input_ids": row.input_ids, "labels": row.labels, TEACHER_PROMPT_IDS: row.teacher_prompt_ids or []} for row in rows],
        vocab_size=vocabulary_size(tokenizer),
        batch_size=batch_size,
        teacher=teacher,
        domain=domain,
        progress=progress,
    )
    tokens_R = scores.tokens_R.astype(np.float64)
    values = {
        "nll": RowValues(scores.nll_R, tokens_R),
        "token_accuracy": RowValues(scores.correct_R.astype(np.float64), tokens_R),
    }
    if scores.kl_R is not None:
        values["kl_to_teacher"] = RowValues(scores.kl_R, tokens_R)
    return values


def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TokenizedRow],
    spec: EvaluationSpec,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    prompts = [row.prompt_ids or [] for row in rows]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=spec.max_new_tokens, batch_size=spec.batch_size, progress=progress
    )
    return [text.strip() for text in tokenizer.batch_decode(answers, skip_special_tokens=True)]


def _matches(rows: Sequence[TokenizedRow], texts: Sequence[str]) -> dict[str, RowValues]:
    exact = [exact_match(text, row.reference) for row, text in zip(rows, texts, strict=True)]
    rouge = [rouge_l(text, row.reference) for row, text in zip(rows, texts, strict=True)]
    values = {"exact_match": _indicator(exact), "rouge_l": RowValues(np.array(rouge), np.ones(len(rouge)))}
    found = [answer_match(text, row.answer) for row, text in zip(rows, texts, strict=True) if row.answer is not None]
    if found:
        values["answer_match"] = _indicator(found)
    return values


def _indicator(hits: Sequence[bool]) -> RowValues:
    return RowValues(np.array(hits, dtype=np.float64), np.ones(len(hits)))
