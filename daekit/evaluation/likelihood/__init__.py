"""Benchmarks that need no judge: minimal pairs, perplexity, multiple choice, rows of a domain, and lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from daekit.evaluation.likelihood.choices import MinimalPairs, MultipleChoice
from daekit.evaluation.likelihood.common import Benchmark, Measured
from daekit.evaluation.likelihood.domain_rows import Rows
from daekit.evaluation.likelihood.lm_eval import LMEval
from daekit.evaluation.likelihood.perplexity import Perplexity
from daekit.recipe.suite import BenchmarkSpec, LMEvalSpec, MinimalPairsSpec, MultipleChoiceSpec, PerplexitySpec, RowsSpec

__all__ = ["Benchmark", "Measured", "Rows", "likelihood_benchmark"]

_CLASSES: dict[type[BenchmarkSpec], Callable[[str, Any], Benchmark]] = {
    MinimalPairsSpec: MinimalPairs,
    PerplexitySpec: Perplexity,
    MultipleChoiceSpec: MultipleChoice,
    RowsSpec: Rows,
    LMEvalSpec: LMEval,
}


def likelihood_benchmark(name: str, spec: BenchmarkSpec) -> Benchmark:
    """The benchmark of a spec, with its input read and checked; UserError if that is missing or broken."""
    return _CLASSES[type(spec)](name, spec)
