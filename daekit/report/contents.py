"""The plain containers of a report: measured values and sample answers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One measured value.

    Attributes:
        model: The model's name, as a rule that of the stage that trained it.
        domain: ``ecommerce``, or ``general/skills`` for one of several sources of a domain.
        metric: One of the metrics in ``daekit.evaluation``.
        value: The value over all ``n`` rows.
        low: The lower end of its 95 % interval.
        high: The upper end of its 95 % interval.
        n: The number of rows of the data that it was measured on.
    """

    model: str
    domain: str
    metric: str
    value: float
    low: float
    high: float
    n: int

    @property
    def is_finite(self) -> bool:
        """Whether value and interval are numbers; those of a diverged model are not."""
        return all(map(math.isfinite, (self.value, self.low, self.high)))


@dataclass(frozen=True)
class Sample:
    """The answer of one model to one prompt.

    Attributes:
        domain: As in ``Row``; domain and ``row`` together identify the prompt.
        row: The index of the row in its evaluation set.
        answer: The right result in any style, if the data hold it.
        exact_match: Whether ``generated`` is the reference; None for a prompt without one.
        answer_match: Whether ``generated`` holds ``answer``; None without ``answer``.
        mark: The judge's verdict.
    """

    model: str
    domain: str
    row: int
    prompt: str
    reference: str
    answer: str | None
    generated: str
    exact_match: bool | None
    answer_match: bool | None
    mark: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that a report shows; equal contents give equal files.

    Attributes:
        title: The heading, as a rule the name of the recipe.
        rows: The measured values, in the order in which models are shown.
        baseline: The model that gain and forgetting are measured against.
        samples: Answers, which are shown by prompt.
        curves: Stage -> the trainer's ``state.log_history`` (``{"step": 10, "loss": 1.2, "kl/ecommerce": 0.3}``...).
        notes: Sentences that a reader must know (rows dropped, a metric left out...).
        versions: Package -> version.
        seconds: Stage -> wall-clock seconds.
        provenance: Further facts, name -> value (commit, data fingerprints, identities of teachers).
        recipe: The resolved recipe as YAML.
        intervals: Where the intervals of the first table are from.
    """

    title: str
    rows: Sequence[Row]
    baseline: str | None = None
    samples: Sequence[Sample] = ()
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    recipe: str = ""
    intervals: str = "a bootstrap over rows"


def group_samples(samples: Sequence[Sample]) -> dict[str, list[list[Sample]]]:
    """Domain -> the answers of all models to each of its prompts, in the order of the first sample of each."""
    groups: dict[str, dict[int, list[Sample]]] = {}
    for sample in samples:
        groups.setdefault(sample.domain, {}).setdefault(sample.row, []).append(sample)
    return {domain: list(by_prompt.values()) for domain, by_prompt in groups.items()}


def rows_json(rows: Sequence[Row]) -> str:
    """A JSON list with one object per row. A value that is not finite (a diverged model) becomes null, which JSON can
    say."""
    entries = [
        {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in asdict(row).items()}
        for row in rows
    ]
    return json.dumps(entries, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def read_rows(text: str) -> list[Row]:
    """The rows that ``rows_json`` has written; null is NaN again."""
    nan: Any = math.nan
    return [Row(**{key: nan if value is None else value for key, value in entry.items()}) for entry in json.loads(text)]


def samples_jsonl(samples: Sequence[Sample]) -> str:
    """One JSON object per line and sample."""
    return "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples)
