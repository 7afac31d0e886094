"""The search for a student: a strategy proposes candidates, rounds score them on more and more text, a log keeps each score.

A search that was killed is resumed by running it again with the same log: the strategy is deterministic, so it proposes the
same candidates again, and what the log holds is read instead of scored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.files import append_json_lines, read_json_lines
from daekit.students.selection import Selection
from daekit.students.space import Candidate, Space
from daekit.students.strategies import Strategy

# (selection, tokens) -> nats per token of the student on that many first tokens of the calibration text
Score = Callable[[Selection, int], float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Round:
    """One round over the candidates of a batch: each is scored on ``tokens``; the best share ``keep``, at least one, go on."""

    tokens: int
    keep: float = 0.25


@dataclass(frozen=True)
class Scored:
    """A candidate with the score of its last round."""

    candidate: Candidate
    parameters: int
    score: float


@dataclass
class SearchResult:
    """The result of a search.

    Attributes:
        best: The best candidate of the last round.
        finalists: All candidates of the last round, the best first.
        candidates: Number of candidates that were scored.
        tokens: Number of tokens that they were scored on, all together: the cost of the search.
    """

    best: Scored
    finalists: list[Scored] = field(repr=False)
    candidates: int
    tokens: int


def run_search(
    space: Space,
    strategy: Strategy,
    score: Score,
    rounds: Sequence[Round],
    *,
    candidates: int,
    log: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Let a strategy propose candidates until enough were scored, or it has no more.

    Args:
        strategy: A strategy over the same space.
        score: The score of a selection on the first tokens of the text; ``CandidateScorer``.
        rounds: The rounds of a batch, with rising tokens; ``keep`` of the last one has no meaning.
        candidates: Number of candidates to score; the last batch is not cut short.
        log: A JSONL file with a line for the search and one for every score. If it exists, the search goes on from it.
        identity: All that the scores depend on (teacher, text, space, seed); a log with another identity is refused.
        progress: Is called with a line of text after every batch.

    Raises:
        UserError: The log is that of another search, or damaged.
    """
    log_book = _Log(log, {"rounds": [[each.tokens, each.keep] for each in rounds]} | dict(identity or {}))
    finalists: list[Scored] = []
    scored = tokens = 0
    clock = _Clock(candidates)
    batch = next(strategy, None)
    while batch:
        results, cost = _score_batch(space, batch, score, rounds, log_book)
        scored, tokens = scored + len(batch), tokens + cost
        scores = [results.get(candidate) for candidate in batch]
        finalists += [Scored(each, space.parameters(each), results[each]) for each in batch if each in results]
        finalists.sort(key=lambda scored: scored.score)
        if progress is not None:
            progress(clock.line(scored, log_book.fresh, finalists[0]))
        if scored >= candidates:
            break
        try:
            batch = strategy.send(scores)
        except StopIteration:
            break
    assert finalists, "a strategy proposes at least one candidate, or raises"
    return SearchResult(finalists[0], finalists, scored, tokens)


def _score_batch(
    space: Space, batch: Sequence[Candidate], score: Score, rounds: Sequence[Round], log: _Log
) -> tuple[dict[Candidate, float], int]:
    """(the scores of the candidates of the last round, the tokens that all candidates were scored on)."""
    left, tokens, scores = list(batch), 0, {}
    for number, each_round in enumerate(rounds):
        scores = {each: log.score(number, each_round.tokens, each, space, score) for each in left}
        tokens += each_round.tokens * len(left)
        if number < len(rounds) - 1:
            keep = max(1, math.ceil(len(left) * each_round.keep))
            left = sorted(left, key=lambda each: scores[each])[:keep]
    return scores, tokens


class _Log:
    """The known scores, by round and candidate; each new score is written at once."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[tuple[int, str], float] = {}
        self.fresh = 0
        if path is None:
            return
        header = json.loads(json.dumps({"search": header}))
        path.parent.mkdir(parents=True, exist_ok=True)
        lines, _ = read_json_lines(path, repair=True)
        if not lines:
            append_json_lines(path, [header])
        elif lines[0] != header:
            raise UserError(
                f"{path}: is the log of another search ({_difference(lines[0], header)}); give this one a log of its own, or "
                "move that one away"
            )
        try:
            self.known = {(line["round"], json.dumps(line["candidate"])): line["score"] for line in lines[1:]}
        except KeyError as error:
            raise UserError(f"{path}: not the log of a search ({error} is missing); move it away to start anew") from error

    def score(self, number: int, tokens: int, candidate: Candidate, space: Space, score: Score) -> float:
        """The score of a candidate on this many tokens, read from the log or computed now."""
        choices = asdict(candidate)
        key = (number, json.dumps(choices))
        if key not in self.known:
            start = time.perf_counter()
            self.known[key] = score(space.selection(candidate), tokens)
            self.fresh += 1
            line = {
                "round": number,
                "tokens": tokens,
                "score": self.known[key],
                "parameters": space.parameters(candidate),
                "seconds": round(time.perf_counter() - start, 4),
                "candidate": choices,
            }
            if self.path is not None:
                append_json_lines(self.path, [line])
        return self.known[key]


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    ours, theirs = expected["search"], found.get("search") or {}
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in keys) or "no header"


class _Clock:
    """Says how fast a search is and how long it will take."""

    def __init__(self, candidates: int) -> None:
        self.candidates, self.start = candidates, time.perf_counter()
        self.at_start: int | None = None

    def line(self, scored: int, fresh: int, best: Scored) -> str:
        """``search 48/200  2.1 candidates/s  1:12 left  best 3.214 nats (12,345,678 parameters)``"""
        parts = [f"search {scored}/{max(self.candidates, scored)}"]
        if not fresh:
            self.at_start, self.start = scored, time.perf_counter()
            parts.append("from the log")
        else:
            done = scored - (self.at_start or 0)
            rate = done / max(time.perf_counter() - self.start, 1e-9)
            left = max(self.candidates - scored, 0) / rate
            parts += [f"{rate:.1f} candidates/s", f"{int(left) // 60}:{int(left) % 60:02d} left"]
        parts.append(f"best {best.score:.4f} nats ({best.parameters:,} parameters)")
        return "  ".join(parts)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, for every candidate the one of its last round."""
    last = {json.dumps(line["candidate"]): line for line in read_json_lines(path)[0][1:]}
    return list(last.values())
