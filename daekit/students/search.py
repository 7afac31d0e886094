"""The search for a student: a strategy proposes, candidates are scored in stages, and every score is logged at once.

A search that was killed is resumed by running it again with the same log: the strategy is deterministic, so it proposes the
same candidates again, and what the log holds is read instead of scored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from daekit.errors import UserError
from daekit.students.selection import Selection
from daekit.students.space import Candidate, Space, to_json
from daekit.students.strategies import Strategy

# nats per token of a student on the first so many tokens of the calibration text
Score = Callable[[Selection, int], float]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """A look at the candidates of a batch: ``tokens`` of text each; the best ``keep`` (a share, at least one) go on."""

    tokens: int
    keep: float = 0.25


@dataclass(frozen=True)
class Scored:
    """A candidate with the score of its last stage."""

    candidate: Candidate
    parameters: int
    score: float


@dataclass
class SearchResult:
    """What a search found.

    Attributes:
        best: the best of those that were scored on the whole text.
        finalists: all of these, the best first.
        candidates: how many were looked at.
        tokens: how many tokens they were scored on, all together: the cost of the search.
    """

    best: Scored
    finalists: list[Scored] = field(repr=False)
    candidates: int
    tokens: int


def run_search(
    space: Space,
    strategy: Strategy,
    score: Score,
    stages: Sequence[Stage],
    *,
    candidates: int,
    log: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Let a strategy propose candidates until so many were looked at, or it has no more.

    Args:
        strategy: of ``strategies``: over the same space.
        score: nats per token of a selection on the first so many tokens; ``CandidateScorer``.
        stages: few tokens first, more for those that are left; ``keep`` of the last one has no meaning.
        candidates: how many to look at; the last batch is not cut short.
        log: a JSONL file: a line for the search, then one for every score. If it exists, the search goes on from it.
        identity: what the scores depend on (teacher, text, space, seed): a log of another search is refused.
        progress: is told a line of text after every batch.

    Raises:
        UserError: a log of another search, a damaged log, or stages whose tokens do not rise.
    """
    if not stages or any(later.tokens <= earlier.tokens for earlier, later in pairwise(stages)):
        raise UserError(
            f"stages={[stage.tokens for stage in stages]}: give at least one, with tokens that rise from stage to stage"
        )
    log_book = _Log(log, {"stages": [[stage.tokens, stage.keep] for stage in stages]} | dict(identity or {}))
    finalists: list[Scored] = []
    looked_at = tokens = 0
    clock = _Clock(candidates)
    batch = next(strategy, None)
    while batch:
        results, cost = _score_batch(space, batch, score, stages, log_book)
        looked_at, tokens = looked_at + len(batch), tokens + cost
        scores = [results.get(candidate) for candidate in batch]
        finalists += [Scored(each, space.parameters(each), results[each]) for each in batch if each in results]
        finalists.sort(key=lambda scored: scored.score)
        if progress is not None:
            progress(clock.line(looked_at, log_book.fresh, finalists[0]))
        if looked_at >= candidates:
            break
        try:
            batch = strategy.send(scores)
        except StopIteration:
            break
    assert finalists, "a strategy proposes something, or says why not"
    return SearchResult(finalists[0], finalists, looked_at, tokens)


def _score_batch(
    space: Space, batch: Sequence[Candidate], score: Score, stages: Sequence[Stage], log: _Log
) -> tuple[dict[Candidate, float], int]:
    """The scores of those that reached the last stage, and the tokens that all were scored on."""
    left, tokens, scores = list(batch), 0, {}
    for number, stage in enumerate(stages):
        scores = {each: log.score(number, stage, each, space, score) for each in left}
        tokens += stage.tokens * len(left)
        if number < len(stages) - 1:
            keep = max(1, math.ceil(len(left) * stage.keep))
            left = sorted(left, key=lambda each: scores[each])[:keep]
    return scores, tokens


class _Log:
    """Scores that are known, by stage and candidate; every new one is written at once."""

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self.path = path
        self.known: dict[tuple[int, str], float] = {}
        self.fresh = 0
        header = json.loads(json.dumps({"search": header}))
        if path is None:
            return
        if path.is_file() and path.stat().st_size:
            self._read(path, header)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(header)

    def score(self, number: int, stage: Stage, candidate: Candidate, space: Space, score: Score) -> float:
        """Of a candidate on the tokens of a stage: known, or scored now."""
        genes = to_json(candidate)
        key = (number, json.dumps(genes))
        if key not in self.known:
            start = time.perf_counter()
            value = score(space.selection(candidate), stage.tokens)
            self.fresh += 1
            self.known[key] = value
            self._write(
                {
                    "stage": number,
                    "tokens": stage.tokens,
                    "score": value,
                    "parameters": space.parameters(candidate),
                    "seconds": round(time.perf_counter() - start, 4),
                    "candidate": genes,
                }
            )
        return self.known[key]

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            with self.path.open("a") as stream:
                stream.write(json.dumps(line) + "\n")

    def _read(self, path: Path, header: Mapping[str, Any]) -> None:
        whole, _, cut_off = path.read_text().rpartition("\n")
        if cut_off:  # killed in the middle of a line: it is scored again
            path.write_text(whole + "\n" if whole else "")
        lines = whole.splitlines()
        if not lines:
            self._write(header)
            return
        try:
            first, *scores = [json.loads(line) for line in lines]
            self.known = {(line["stage"], json.dumps(line["candidate"])): line["score"] for line in scores}
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the log of a search ({error}); move it away to start anew") from error
        if first != header:
            raise UserError(
                f"{path}: is the log of another search ({_difference(first, header)}); give this one a log of its own, or "
                "move that one away"
            )


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    ours, theirs = expected["search"], found.get("search") or {}
    keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    return "; ".join(f"{key}: {theirs.get(key)!r} there, {ours.get(key)!r} here" for key in keys) or "no header"


class _Clock:
    """How fast a search is and how long it will take."""

    def __init__(self, candidates: int) -> None:
        self.candidates, self.start = candidates, time.perf_counter()
        self.at_start: int | None = None

    def line(self, looked_at: int, fresh: int, best: Scored) -> str:
        """``search 48/200  2.1 candidates/s  1:12 left  best 3.214 nats (12,345,678 parameters)``"""
        parts = [f"search {looked_at}/{max(self.candidates, looked_at)}"]
        if not fresh:
            self.at_start, self.start = looked_at, time.perf_counter()
            parts.append("from the log")
        else:
            done = looked_at - (self.at_start or 0)
            rate = done / max(time.perf_counter() - self.start, 1e-9)
            left = max(self.candidates - looked_at, 0) / rate
            parts += [f"{rate:.1f} candidates/s", f"{int(left) // 60}:{int(left) % 60:02d} left"]
        parts.append(f"best {best.score:.4f} nats ({best.parameters:,} parameters)")
        return "  ".join(parts)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The scores of a log: for every candidate the line of its last stage."""
    last: dict[str, dict[str, Any]] = {}
    for line in path.read_text().splitlines()[1:]:
        entry = json.loads(line)
        last[json.dumps(entry["candidate"])] = entry
    return list(last.values())
