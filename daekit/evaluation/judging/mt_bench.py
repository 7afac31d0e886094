"""MT-Bench: judged through fschat's own matches and functions, written in FastChat's formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from daekit.evaluation.judging.calls import Estimate
from daekit.evaluation.judging.engine import Engine
from daekit.evaluation.judging.result import Judged
from daekit.recipe.judge import JudgeSpec

Mode = Literal["single", "pairwise-baseline", "pairwise-all"]


def judge_mt_bench(
    judge: JudgeSpec | Engine,
    data_dir: Path,
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
    *,
    mode: Mode = "single",
    baseline: str | None = None,
    allow_missing: int = 0,
    limit: int | None = None,
    bootstrap: int = 1000,
) -> Judged:
    """Judge the answers of all models.

    Args:
        judge: a spec, or an open engine (limits of calls and cost then hold for everything that it is asked).
        data_dir: holds ``question.jsonl``, ``judge_prompts.jsonl`` and ``reference_answer/*.jsonl``, as FastChat has them.
        answers: model -> records of FastChat's ``model_answer/<model>.jsonl``, one per question.
        folder: written: ``<judge>_single.jsonl`` or ``<judge>_pair.jsonl``, and the calls (``replies.jsonl``...).
        baseline: the model of ``answers`` that the others are compared with (``pairwise-baseline``).
        allow_missing: judgments of a model that may be missing for its scores to be given nonetheless.
        limit: only the first so many questions.
        bootstrap: resamples of the intervals.
    """
    raise NotImplementedError


def estimate_mt_bench(
    judge: JudgeSpec | Engine,
    data_dir: Path,
    models: Sequence[str],
    folder: Path,
    *,
    answers: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    answer_tokens: int = 300,
    mode: Mode = "single",
    baseline: str | None = None,
    limit: int | None = None,
) -> Estimate:
    """What ``judge_mt_bench`` would still cost; without ``answers`` each is taken to have ``answer_tokens`` tokens."""
    raise NotImplementedError
