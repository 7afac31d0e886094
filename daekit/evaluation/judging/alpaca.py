"""AlpacaEval: judged through alpaca_eval's own annotators and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from daekit.evaluation.judging.calls import Estimate
from daekit.evaluation.judging.engine import Engine
from daekit.evaluation.judging.result import Judged
from daekit.recipe.judge import JudgeSpec


def judge_alpaca_eval(
    judge: JudgeSpec | Engine,
    annotator: str,
    reference_outputs: Path,
    outputs: Mapping[str, Sequence[Mapping[str, Any]]],
    folder: Path,
    *,
    allow_missing: int = 0,
    limit: int | None = None,
    bootstrap: int = 1000,
) -> Judged:
    """Compare the outputs of all models with the reference outputs.

    Args:
        judge: a spec, or an open engine.
        annotator: one of alpaca_eval's evaluator configs, or a directory that holds one (``configs.yaml`` and a template).
        reference_outputs: a JSON list of ``{"instruction", "output", "generator"}``; its order is the order of everything.
        outputs: model -> ``{"instruction", "output"}`` of every instruction.
        folder: written: ``<model>/<annotator>/annotations.json`` and ``leaderboard.csv``, ``<model>/model_outputs.json``,
            and the calls.
        allow_missing, limit, bootstrap: as in ``judge_mt_bench``.
    """
    raise NotImplementedError


def estimate_alpaca_eval(
    judge: JudgeSpec | Engine,
    annotator: str,
    reference_outputs: Path,
    models: Sequence[str],
    folder: Path,
    *,
    outputs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    answer_tokens: int = 300,
    limit: int | None = None,
) -> Estimate:
    """What ``judge_alpaca_eval`` would still cost; without ``outputs`` each is taken to have ``answer_tokens`` tokens."""
    raise NotImplementedError
