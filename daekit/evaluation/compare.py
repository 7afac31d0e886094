"""What was gained on the domains and what was forgotten elsewhere, measured on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from daekit.data.tokenize import TokenizedRow
from daekit.errors import UserError
from daekit.evaluation.evaluate import ModelEvaluation
from daekit.evaluation.intervals import SEED, paired_interval
from daekit.evaluation.matching import answer_match, exact_match
from daekit.evaluation.sets import EvaluationSet
from daekit.report.contents import Row, Sample
from daekit.report.metrics import METRICS


def compare(
    evaluations: Sequence[ModelEvaluation], baseline: str, *, reference_domains: Sequence[str], rounds: int
) -> list[Row]:
    """``<metric>_gain`` on the domains and ``<metric>_forgetting`` on ``reference_domains``, of every model but the baseline.

    A gain is positive where the model is better than the baseline, forgetting is positive where it is worse. Intervals are
    paired: both models are resampled on the same rows.

    Raises:
        UserError: ``baseline`` is none of the models.
    """
    by_name = {evaluation.model: evaluation for evaluation in evaluations}
    if baseline not in by_name:
        raise UserError(
            f"evaluation.baseline is {baseline!r}, which was not evaluated: name one of {', '.join(by_name)} or leave it out."
        )
    theirs = by_name.pop(baseline).by_domain()
    rows = []
    for name, evaluation in by_name.items():
        for (domain, label, metric), values in evaluation.by_domain().items():
            if metric not in METRICS or not METRICS[metric].compared:
                continue
            base = theirs[domain, label, metric]
            forgetting = domain in reference_domains
            # what counts as more: better for a gain, worse for forgetting
            higher_is_better = METRICS[metric].most is not None
            more, less = (values, base) if higher_is_better != forgetting else (base, values)
            low, high = paired_interval(more, less, rounds, SEED)
            kind = "forgetting" if forgetting else "gain"
            rows.append(Row(name, label, f"{metric}_{kind}", more.mean - less.mean, low, high, len(values.total_R)))
    return rows


def select_samples(
    evaluations: Sequence[ModelEvaluation], sets: Mapping[str, EvaluationSet], *, first: int = 5, mismatches: int = 20
) -> list[Sample]:
    """Answers to show side by side: of each set the ``first`` rows, and rows that some model did not answer with the reference.

    Of the latter at most ``mismatches``, those first on which the models differ. Every model's answer to a chosen row is shown.
    """
    samples = []
    for source, evaluation_set in sets.items():
        texts = {e.model: e.generated[source] for e in evaluations if source in e.generated}
        answered = [(index, row) for index, row in enumerate(evaluation_set.rows) if row.prompt_ids is not None]
        several = sum(other.domain == evaluation_set.domain for other in sets.values()) > 1
        label = f"{evaluation_set.domain}/{source}" if several else evaluation_set.domain
        for at in _chosen([row for _, row in answered], list(texts.values()), first, mismatches):
            index, row = answered[at]
            for model, generated in texts.items():
                text = generated[at]
                found = None if row.answer is None else answer_match(text, row.answer)
                shown = (row.prompt, row.reference, row.answer, text, exact_match(text, row.reference), found)
                samples.append(Sample(model, label, index, *shown))
    return samples


def _chosen(rows: Sequence[TokenizedRow], texts: Sequence[Sequence[str]], first: int, mismatches: int) -> list[int]:
    def hits(at: int) -> int:
        return sum(exact_match(generated[at], rows[at].reference) for generated in texts)

    missed = [at for at in range(first, len(rows)) if hits(at) < len(texts)]
    missed.sort(key=lambda at: hits(at) == 0)  # stable: rows on which the models differ come first
    return [*range(min(first, len(rows))), *sorted(missed[:mismatches])]
