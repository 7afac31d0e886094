"""What benchmarks whose answers a judge rates have in common: their cost, and scores unless too many judgments are missing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from daekit.evaluation.intervals import SEED
from daekit.generation.budget import estimate
from daekit.generation.calls import CHARACTERS_PER_TOKEN, ChatRequest, Estimate
from daekit.generation.client import ChatClient, identity, require_sound
from daekit.generation.keys import is_openai
from daekit.generation.store import REPLIES, read_replies
from daekit.recipe.judge import JudgeSpec
from daekit.report.contents import Row
from daekit.report.provenance import versions

Record = Mapping[str, Any]
Answers = Mapping[str, Sequence[Record]]  # model -> its answers, in the form of the benchmark
_QUOTED = 80  # characters of an answer that an error shows
_INVENTED = "x" * (300 * CHARACTERS_PER_TOKEN)  # an answer that is not there yet is taken to have 300 tokens
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
    verdicts: Sequence[Record] = ()


@dataclass
class Missing:
    """Judgments of one model that are not there.

    Attributes:
        total: judgments that there should be.
        unanswered: the judge was not asked, or did not answer.
        unread: its answer holds no verdict that the parser reads.
        example: one of the unread answers; empty where there is none, or it is empty.
    """

    total: int = 0
    unanswered: int = 0
    unread: int = 0
    example: str = ""

    @property
    def count(self) -> int:
        """All that are missing."""
        return self.unanswered + self.unread


class JudgedBenchmark(ABC):
    """A benchmark whose answers a judge rates, with all that the judge is asked with."""

    name: ClassVar[str]

    @abstractmethod
    def invented(self, model: str, text: str) -> Sequence[Record]:
        """Answers of a model that has not been asked yet, each of which is ``text``."""

    @abstractmethod
    def requests(self, judge: JudgeSpec, answers: Answers) -> list[ChatRequest]:
        """Everything that judging the answers asks; UserError for answers that do not fit."""

    @abstractmethod
    def judge(
        self, client: ChatClient, answers: Answers, folder: Path, *, allow_missing: int = 0, bootstrap: int = 1000
    ) -> Judged:
        """Judge the answers of all models.

        Args:
            client: The judge (limits of calls and cost hold for everything that it is asked).
            folder: Where judgments are written, in the formats of the benchmark's own package.
            allow_missing: judgments of a model that may be missing for its scores to be given nonetheless.
            bootstrap: resamples of the intervals.

        Raises:
            UserError: answers do not fit; the judge cannot be asked at all.
        """

    def estimate(self, judge: JudgeSpec, models: Sequence[str], folder: Path, answers: Answers | None = None) -> Estimate:
        """What judging would still cost; without ``answers`` each is taken to have 300 tokens."""
        require_sound(judge)
        if answers is None:
            answers = {model: self.invented(model, f"{model} {_INVENTED}") for model in models}
        return estimate(judge, self.requests(judge, answers), read_replies(folder), identity(judge))

    def _withhold(
        self,
        client: ChatClient,
        scores: Mapping[str, Sequence[Row]],
        missing: Mapping[str, Missing],
        allow_missing: int,
        parser: tuple[str, str],
    ) -> tuple[list[Row], list[str], list[str]]:
        """(rows, notes, refusals): the scores of each model unless more than ``allow_missing`` judgments are missing, and
        always how many are. ``parser``: what reads verdicts, and what may be chosen in its place."""
        rows: list[Row] = []
        notes, refusals = [], []
        for model, its in scores.items():
            lack = missing[model]
            count = float(lack.count)
            rows.append(Row(model, self.name, "missing_judgments", count, count, count, lack.total))
            said = (
                f"{self.name}: {lack.count} of {lack.total} judgments of {model} are missing ({lack.unanswered} without an "
                f"answer, {lack.unread} whose answer holds no verdict)"
            )
            if lack.count > allow_missing:
                why = f" The run ended early: {client.budget.stopped}." if client.budget.stopped else ""
                refusals.append(f"{said}; its scores are withheld.{why} {_remedies(lack, parser, client.folder / REPLIES)}")
                continue
            if lack.count:
                notes.append(f"{said}; its scores are of the others (--allow-missing {allow_missing}).")
            rows += its
        return rows, notes, refusals

    def _manifest(self, client: ChatClient, bootstrap: int, requests: Sequence[ChatRequest]) -> dict[str, Any]:
        """The part of a manifest that all benchmarks share: judge, hashes, versions, seeds; no credentials."""
        spec, budget = client.spec, client.budget
        replies = [reply for reply in map(client.reply, requests) if reply is not None]
        judge = {key: value for key, value in spec.model_dump(mode="json").items() if key not in _NOT_IN_MANIFEST}
        return {
            "benchmark": self.name,
            "judge": {"name": spec.name, **judge, "endpoint": client.identity},
            "judge_models": sorted({reply.model for reply in replies if reply.model}),
            "replies": len(replies),
            "calls": {"sent": budget.calls, "repeated": budget.retries, "failed": budget.failed, "stopped": budget.stopped},
            "tokens": {"prompt": budget.prompt_tokens, "completion": budget.completion_tokens},
            "cost": budget.cost if spec.price_prompt is not None else None,
            "bootstrap": {"rounds": bootstrap, "seed": SEED},
            "versions": versions(_PACKAGES),
        }


def own_parameters(judge: JudgeSpec) -> dict[str, Any]:
    """What a judge is to be sent instead of the benchmark's own parameters."""
    own = {"temperature": judge.temperature, "max_tokens": judge.max_tokens, "seed": judge.seed}
    return {key: value for key, value in own.items() if value is not None}


def _remedies(lack: Missing, parser: tuple[str, str], replies: Path) -> str:
    """How to go on: what has no answer is sent by another run, what cannot be read is not."""
    remedies = []
    if lack.unanswered:
        remedies.append(f"Run again to send the {lack.unanswered} without an answer.")
    if lack.unread:
        reads, others = parser
        remedies.append(
            f"{reads} finds no verdict in {lack.unread} (one begins {lack.example[:_QUOTED]!r}), and another run does "
            f"not ask again what is answered: choose {others}, or delete {replies} to ask everything again."
        )
    return " ".join([*remedies, f"Or allow what is missing: --allow-missing {lack.count}."])


def not_comparable(benchmark: str, judge: JudgeSpec, official: str, deviations: Mapping[str, object]) -> list[str]:
    """A note where the judge is not the ``official`` one, or something else deviates (its value is true) from how the
    published numbers were made."""
    deviations = {
        f"the judge is {judge.name}, not {official}": judge.name != official,
        f"{official} is not asked at OpenAI": judge.name == official and not is_openai(judge.base_url),
        **deviations,
    }
    reasons = "; ".join(what for what, deviates in deviations.items() if deviates)
    return [f"{benchmark}: not comparable with published numbers ({reasons})."] if reasons else []
