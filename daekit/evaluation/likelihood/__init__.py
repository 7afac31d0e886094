"""Benchmarks that need no judge: minimal pairs, perplexity, multiple choice, rows of a domain, and lm-eval's tasks."""

from __future__ import annotations

from daekit.evaluation.likelihood.common import Benchmark, Measured
from daekit.evaluation.likelihood.lm_eval import LMEval
from daekit.evaluation.likelihood.minimal_pairs import MinimalPairs
from daekit.evaluation.likelihood.multiple_choice import MultipleChoice
from daekit.evaluation.likelihood.perplexity import Perplexity
from daekit.evaluation.likelihood.rows import Rows
from daekit.recipe.suite import (
    BenchmarkSpec,
    LMEvalSpec,
    MinimalPairsSpec,
    MultipleChoiceSpec,
    PerplexitySpec,
    RowsSpec,
)

__all__ = ["Benchmark", "Measured", "likelihood_benchmark"]


def likelihood_benchmark(name: str, spec: BenchmarkSpec) -> Benchmark:
    """The benchmark of a spec, with its input read and checked.

    Raises:
        UserError: its input is missing or broken.
    """
    match spec:
        case MinimalPairsSpec():
            return MinimalPairs(name, spec)
        case PerplexitySpec():
            return Perplexity(name, spec)
        case MultipleChoiceSpec():
            return MultipleChoice(name, spec)
        case RowsSpec():
            return Rows(name, spec)
        case LMEvalSpec():
            return LMEval(name, spec)
    raise TypeError(f"{type(spec).__name__} is not a likelihood benchmark")
