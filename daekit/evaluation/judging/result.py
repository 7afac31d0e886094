"""What judging a benchmark gives: scores unless too many judgments are missing, and what makes them repeatable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from daekit.evaluation.evaluate import SEED
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient
from daekit.generation.keys import is_openai
from daekit.recipe.judge import JudgeSpec
from daekit.report.contents import Row
from daekit.report.provenance import versions

_QUOTED = 80  # characters of an answer that an error shows
_PACKAGES = ("daekit", "fschat", "alpaca_eval", "transformers", "torch")
# what decides when and whether a call is sent, but not what the judge says
_NOT_IN_MANIFEST = ("base_url", "path", "concurrency", "max_retries", "timeout", "batch_size")


@dataclass(frozen=True)
class Judged:
    """The scores of all models on one benchmark, and everything that a reader must know about them.

    Attributes:
        rows: see the table in ``daekit.evaluation.judging``.
        notes: sentences for the report: parser, comparability, missing judgments that were allowed.
        refusals: one sentence per model whose scores are withheld because judgments are missing; whoever calls should end
            with an error that says them, after writing everything.
        manifest: what makes the scores repeatable; plain values only, no credentials.
        verdicts: one mapping per judgment (model, question, turn, score or verdict, prompt, text of the judge), to show.
    """

    rows: Sequence[Row]
    notes: Sequence[str] = ()
    refusals: Sequence[str] = ()
    manifest: Mapping[str, Any] = field(default_factory=dict)
    verdicts: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Missing:
    """Judgments of one model that are not there.

    Attributes:
        unanswered: the judge was not asked, or did not answer.
        unread: its answer holds no verdict that the parser reads.
        total: judgments that there should be.
        example: one of the unread answers; empty where there is none, or it is empty.
    """

    unanswered: int
    unread: int
    total: int
    example: str = ""

    @property
    def count(self) -> int:
        """All that are missing."""
        return self.unanswered + self.unread


@dataclass(frozen=True)
class Reading:
    """How verdicts are read, in words.

    Attributes:
        parser: what reads them.
        others: what may be chosen in its place.
        replies: the file with the judge's answers.
    """

    parser: str
    others: str
    replies: Path


def withhold(
    benchmark: str,
    scores: Mapping[str, Sequence[Row]],
    missing: Mapping[str, Missing],
    allow_missing: int,
    stopped: str | None,
    reading: Reading,
) -> tuple[list[Row], list[str], list[str]]:
    """(rows, notes, refusals): the scores of each model unless more than ``allow_missing`` judgments are missing, and always
    how many are."""
    rows: list[Row] = []
    notes, refusals = [], []
    for model, its in scores.items():
        lack = missing[model]
        count = float(lack.count)
        rows.append(Row(model, benchmark, "missing_judgments", count, count, count, lack.total))
        said = (
            f"{benchmark}: {lack.count} of {lack.total} judgments of {model} are missing ({lack.unanswered} without an answer, "
            f"{lack.unread} whose answer holds no verdict)"
        )
        if lack.count > allow_missing:
            why = f" The run ended early: {stopped}." if stopped else ""
            refusals.append(f"{said}; its scores are withheld.{why} {_remedies(lack, reading)}")
            continue
        if lack.count:
            notes.append(f"{said}; its scores are of the others (--allow-missing {allow_missing}).")
        rows += its
    return rows, notes, refusals


def _remedies(lack: Missing, reading: Reading) -> str:
    """How to go on: what has no answer is sent by another run, what cannot be read is not."""
    remedies = []
    if lack.unanswered:
        remedies.append(f"Run again to send the {lack.unanswered} without an answer.")
    if lack.unread:
        remedies.append(
            f"{reading.parser} finds no verdict in {lack.unread} (one begins {lack.example[:_QUOTED]!r}), and another run does "
            f"not ask again what is answered: choose {reading.others}, or delete {reading.replies} to ask everything again."
        )
    return " ".join([*remedies, f"Or allow what is missing: --allow-missing {lack.count}."])


def describe(client: ChatClient, benchmark: str, bootstrap: int, requests: Sequence[ChatRequest]) -> dict[str, Any]:
    """The part of a manifest that both benchmarks share: judge, hashes, versions, seeds; no credentials."""
    spec, budget = client.spec, client.budget
    replies = [reply for reply in map(client.reply, requests) if reply is not None]
    judge = {key: value for key, value in spec.model_dump(mode="json").items() if key not in _NOT_IN_MANIFEST}
    return {
        "benchmark": benchmark,
        "judge": {"name": spec.name, **judge, "endpoint": client.identity},
        "judge_models": sorted({reply.model for reply in replies if reply.model}),
        "replies": len(replies),
        "calls": {"sent": budget.calls, "repeated": budget.retries, "failed": budget.failed, "stopped": budget.stopped},
        "tokens": {"prompt": budget.prompt_tokens, "completion": budget.completion_tokens},
        "cost": budget.cost if spec.price_prompt is not None else None,
        "bootstrap": {"rounds": bootstrap, "seed": SEED},
        "versions": versions(_PACKAGES),
    }


def other_judge(spec: JudgeSpec, official: str) -> dict[str, bool]:
    """How a judge differs from the official one (see ``not_comparable``)."""
    return {
        f"the judge is {spec.name}, not {official}": spec.name != official,
        f"{official} is not asked at OpenAI": spec.name == official and not is_openai(spec.base_url),
    }


def not_comparable(benchmark: str, deviations: Mapping[str, object]) -> list[str]:
    """A note where something deviates (its value is true) from how the published numbers were made."""
    reasons = "; ".join(what for what, deviates in deviations.items() if deviates)
    return [f"{benchmark}: not comparable with published numbers ({reasons})."] if reasons else []
