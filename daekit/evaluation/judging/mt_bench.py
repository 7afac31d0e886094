"""MT-Bench: judged through fschat's own matches and functions, written in FastChat's formats."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from daekit.errors import UserError
from daekit.evaluation.intervals import RowValues
from daekit.evaluation.judging import fastchat
from daekit.evaluation.judging.result import Answers, Judged, JudgedBenchmark, Missing, Record, not_comparable, own_parameters
from daekit.files import facts_hash, file_hash, write_whole
from daekit.generation.calls import ChatRequest
from daekit.generation.client import ChatClient
from daekit.recipe.judge import JudgeSpec
from daekit.report.contents import Row

Mode = Literal["single", "pairwise-baseline", "pairwise-all"]
_NAME = "mt_bench"
_RATING = re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]")
_WINNER = re.compile(r"\[\[([ABC])\]\]")
_LOWEST, _HIGHEST = 1, 10
_NO_RATING = -1  # FastChat's score of a reply in which it finds none
_OFFICIAL_JUDGE, _OFFICIAL_QUESTIONS = "gpt-4", 80
_READS = {"strict": "the last verdict, ratings within 1 and 10", "fastchat": "as FastChat does: the first rating, any size"}
_OTHER_PARSER = {"strict": "fastchat", "fastchat": "strict"}


@dataclass(frozen=True)
class _Game:
    """A match of FastChat's, and what it asks: one request, or one for each order of a pair."""

    match: Any
    requests: tuple[ChatRequest, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.match.model,) if hasattr(self.match, "model") else (self.match.model_1, self.match.model_2)


class MTBench(JudgedBenchmark):
    """MT-Bench; answers are records of FastChat's ``model_answer/<model>.jsonl``, one per question.

    Args:
        data_dir: holds ``question.jsonl``, ``judge_prompts.jsonl`` and ``reference_answer/gpt-4.jsonl``, as FastChat has them.
        baseline: the model that the others are compared with (``pairwise-baseline``).
        limit: how many questions, from the first on.

    Raises:
        UserError: a data file is missing or damaged.
    """

    name = _NAME

    def __init__(self, data_dir: Path, mode: Mode = "single", baseline: str | None = None, limit: int | None = None) -> None:
        self.mode, self.baseline = mode, baseline
        self.data = fastchat.load_data(data_dir, limit)

    def invented(self, model: str, text: str) -> Sequence[Record]:
        """A text for every turn."""
        return [
            {"question_id": each["question_id"], "choices": [{"turns": [text] * len(each["turns"])}]}
            for each in self.data.questions
        ]

    def requests(self, judge: JudgeSpec, answers: Answers) -> list[ChatRequest]:
        """One per rating, two per pair."""
        return [request for game in self._games(judge, self._by_question(answers)) for request in game.requests]

    def judge(
        self, client: ChatClient, answers: Answers, folder: Path, *, allow_missing: int = 0, bootstrap: int = 1000
    ) -> Judged:
        """See ``JudgedBenchmark``. Written: ``<judge>_single.jsonl`` or ``<judge>_pair.jsonl``."""
        by_question = self._by_question(answers)
        games = self._games(client.spec, by_question)
        requests = [request for game in games for request in game.requests]
        client.ask(requests)
        played = [_play(game, client) for game in games]
        records = [record for record, _ in played if record is not None]
        single = self.mode == "single"
        name = f"{client.spec.name.replace(os.sep, '_')}_{'single' if single else 'pair'}.jsonl"
        write_whole(folder / name, "".join(json.dumps(record) + "\n" for record in records))
        scores = {}
        for model in [model for model in answers if self.mode != "pairwise-baseline" or model != self.baseline]:
            its = [r for r in records if model in (r.get("model"), r.get("model_1"), r.get("model_2"))]
            scores[model] = _rows(model, its, self.data.questions, single, bootstrap)
        parser = client.spec.score_parser
        others = f"another judge, other prompts (judge_prompts.jsonl) or score_parser: {_OTHER_PARSER[parser]}"
        missing = _missing(games, [record for record, _ in played])
        rows, lacks, refusals = self._withhold(client, scores, missing, allow_missing, (f"score_parser {parser}", others))
        notes = [*self._notes(client.spec, records, sum(differs for _, differs in played)), *lacks, *client.notes(requests)]
        manifest = self._manifest(client, bootstrap, requests) | {
            "mode": self.mode,
            "baseline": self.baseline,
            "questions": len(self.data.questions),
            "data": {file.name: file_hash(file) for file in self.data.files},
            "prompts": {name: facts_hash(prompt) for name, prompt in self.data.prompts.items()},
            "answers": {
                model: facts_hash([(number, record["choices"][0]["turns"]) for number, record in its.items()])
                for model, its in by_question.items()
            },
        }
        return Judged(rows, notes, refusals, manifest, records)

    def _by_question(self, answers: Answers) -> dict[str, dict[int, Record]]:
        """Answers by question id, each with a text for every turn."""
        found: dict[str, dict[int, Record]] = {}
        for model, records in answers.items():
            its = {record["question_id"]: record for record in records}
            if len(its) < len(records):
                numbers = [record["question_id"] for record in records]
                twice = next(number for number in numbers if numbers.count(number) > 1)
                raise UserError(f"MT-Bench: {model} answers question {twice} twice; keep one of the answers.")
            for question in self.data.questions:
                number, turns = question["question_id"], len(question["turns"])
                if number not in its:
                    raise UserError(f"MT-Bench: {model} has no answer to question {number}; generate its answers again.")
                texts = its[number]["choices"][0]["turns"]
                if len(texts) != turns or not all(isinstance(text, str) for text in texts):
                    raise UserError(
                        f"MT-Bench: {model}'s answer to question {number} does not hold a text for each of its {turns} turns."
                    )
            found[model] = {question["question_id"]: its[question["question_id"]] for question in self.data.questions}
        return found

    def _games(self, judge: JudgeSpec, by_question: Mapping[str, Mapping[int, Record]]) -> list[_Game]:
        if self.mode == "pairwise-baseline" and self.baseline not in by_question:
            raise UserError(
                f"MT-Bench: mode pairwise-baseline compares with baseline, and {self.baseline!r} is none of the models "
                f"({', '.join(by_question)}); name one of them."
            )
        if self.mode != "single" and len(by_question) < 2:
            raise UserError(f"MT-Bench: mode {self.mode} needs at least two models; with one, use mode single.")
        games, own = [], own_parameters(judge)
        for match in fastchat.make_matches(self.data, judge.name, by_question, self.mode, self.baseline):
            label = f"MT-Bench question {match.question['question_id']}, turn {1 + match.multi_turn}"
            asked = fastchat.asked_by(match)
            games.append(_Game(match, tuple(ChatRequest(messages, theirs | own, label=label) for messages, theirs in asked)))
        return games

    def _notes(self, judge: JudgeSpec, records: Sequence[Record], differ: int) -> list[str]:
        parser, count = judge.score_parser, len(self.data.questions)
        notes = [
            f"MT-Bench ({self.mode}): score_parser {parser} (default: strict) reads {_READS[parser]}; "
            f"{_OTHER_PARSER[parser]} would read {differ} judgments otherwise."
        ]
        outside = sum(
            _is_rated(record) and not _LOWEST <= record["score"] <= _HIGHEST for record in records if "score" in record
        )
        if outside:
            notes.append(f"MT-Bench: {outside} ratings lie outside {_LOWEST} to {_HIGHEST} and are counted as they are.")
        deviations = {
            f"{count} questions, not {_OFFICIAL_QUESTIONS}": count != _OFFICIAL_QUESTIONS,
            f"FastChat would read {differ} judgments otherwise": parser == "strict" and differ,
            "temperature or max_tokens is not FastChat's": judge.temperature is not None or judge.max_tokens is not None,
        }
        return [*notes, *not_comparable("MT-Bench", judge, _OFFICIAL_JUDGE, deviations)]


def _play(game: _Game, client: ChatClient) -> tuple[Record | None, bool]:
    """FastChat's record of a game as the spec's parser reads it (None while a reply is missing), and whether the other parser
    would read it otherwise."""
    replies = [reply for reply in map(client.reply, game.requests) if reply is not None]
    if len(replies) < len(game.requests):
        return None, False
    record = fastchat.play(game.match, [reply.text for reply in replies])
    record["tstamp"] = max(reply.time for reply in replies)  # so that a rerun writes the same file
    strict = record | _strictly(record)
    return strict if client.spec.score_parser == "strict" else record, strict != record


def _missing(games: Sequence[_Game], records: Sequence[Record | None]) -> dict[str, Missing]:
    found: dict[str, Missing] = {}
    for game, record in zip(games, records, strict=True):
        for model in game.models:
            lack = found.setdefault(model, Missing())
            lack.total += 1
            if record is None:
                lack.unanswered += 1
            elif not _is_rated(record):
                lack.unread += 1
                lack.example = lack.example or _unread_text(record)
    return found


# ---- what the judge's text says, and the numbers that FastChat's ``show_result`` prints ------------------------------


def strict_rating(text: str) -> float | None:
    """The last ``[[rating]]`` within 1 and 10: what stands before it may be a quotation of the answer."""
    within = [rating for rating in map(float, _RATING.findall(text)) if _LOWEST <= rating <= _HIGHEST]
    return within[-1] if within else None


def strict_winner(text: str) -> str:
    """``A``, ``B`` or ``tie`` by the last verdict, or ``error`` where there is none, as FastChat calls them."""
    verdicts = _WINNER.findall(text)
    return {"A": "A", "B": "B", "C": "tie"}[verdicts[-1]] if verdicts else "error"


def _strictly(record: Record) -> dict[str, Any]:
    """The entries of FastChat's record that depend on how the judge's text is read."""
    if "judgment" in record:
        rating = strict_rating(record["judgment"])
        return {"score": _NO_RATING if rating is None else rating}
    seats = ({"A": "model_1", "B": "model_2"}, {"A": "model_2", "B": "model_1"})
    winners = [strict_winner(record[f"g{order}_judgment"]) for order in (1, 2)]
    return {f"g{at}_winner": seat.get(winner, winner) for at, seat, winner in zip((1, 2), seats, winners, strict=True)}


def _is_rated(record: Record) -> bool:
    """Whether the judge's text held a rating, or a verdict in both orders."""
    if "score" in record:
        return record["score"] != _NO_RATING
    return "error" not in (record["g1_winner"], record["g2_winner"])


def _unread_text(record: Record) -> str:
    """The judge's text, of a pair in the first order, that held no verdict."""
    if "score" in record:
        return str(record["judgment"])
    return str(next(record[f"g{order}_judgment"] for order in (1, 2) if record[f"g{order}_winner"] == "error"))


def _rows(model: str, records: Sequence[Record], questions: Sequence[Record], single: bool, rounds: int) -> list[Row]:
    """Mean ratings of everything, of each turn and of each category; or of everything and of each turn the shares of games that
    are won, won with ties as halves, and judged the same in both orders."""
    rated = [record for record in records if _is_rated(record)]
    parts = {_NAME: rated} | {f"{_NAME}/turn_{turn}": [each for each in rated if each["turn"] == turn] for turn in (1, 2)}
    metrics: dict[str, Callable[[Record], float]] = {
        "pairwise_win_rate": lambda record: float(_points(record, model) == 1),
        "pairwise_win_rate_adjusted": lambda record: _points(record, model),
        "position_consistency": lambda record: float(record["g1_winner"] == record["g2_winner"]),
    }
    if single:
        metrics = {"judge_score": lambda record: record["score"]}
        categories = {question["question_id"]: question["category"] for question in questions}
        for category in dict.fromkeys(categories.values()):
            parts[f"{_NAME}/{category}"] = [each for each in rated if categories[each["question_id"]] == category]
    values = {
        (domain, metric): _values(its, value) for metric, value in metrics.items() for domain, its in parts.items() if its
    }
    return [each.row(model, domain, metric, rounds) for (domain, metric), each in values.items()]


def _values(records: Sequence[Record], value: Callable[[Record], float]) -> RowValues:
    """What is resampled are the questions, whose turns and games belong together."""
    by_question: dict[int, list[float]] = {}
    for record in records:
        by_question.setdefault(record["question_id"], []).append(value(record))
    sums, sizes = [sum(its) for its in by_question.values()], [len(its) for its in by_question.values()]
    return RowValues(np.array(sums, dtype=np.float64), np.array(sizes, dtype=np.float64))


def _points(record: Record, model: str) -> float:
    """1 for a win in both orders, 0 for a loss in both, else a tie."""
    if record["g1_winner"] == "tie" or record["g1_winner"] != record["g2_winner"]:
        return 0.5
    return float(record[record["g1_winner"]] == model)
