"""MT-Bench: judged through fschat's own matches and functions, written in FastChat's formats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from daekit.errors import UserError
from daekit.evaluation.judging import fastchat
from daekit.evaluation.judging.fastchat import BenchData, Record
from daekit.evaluation.judging.result import Judged, Missing, Reading, describe, not_comparable, other_judge, withhold
from daekit.evaluation.judging.scores import HIGHEST, LOWEST, is_rated, pair_rows, single_rows, strictly, unread_text
from daekit.files import facts_hash, file_hash, write_whole
from daekit.generation.budget import estimate
from daekit.generation.calls import CHARACTERS_PER_TOKEN, ChatRequest, Estimate
from daekit.generation.client import ChatClient, identity, require_sound
from daekit.generation.store import REPLIES, read_replies
from daekit.recipe.judge import JudgeSpec

Mode = Literal["single", "pairwise-baseline", "pairwise-all"]
Answers = Mapping[str, Sequence[Mapping[str, Any]]]  # model -> records of FastChat's ``model_answer/<model>.jsonl``
_OFFICIAL_JUDGE, _OFFICIAL_QUESTIONS = "gpt-4", 80


@dataclass(frozen=True)
class _Game:
    """A match of FastChat's, and what it asks: one request, or one for each order of a pair."""

    match: Any
    requests: tuple[ChatRequest, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return (self.match.model,) if hasattr(self.match, "model") else (self.match.model_1, self.match.model_2)


def judge_mt_bench(
    client: ChatClient,
    data_dir: Path,
    answers: Answers,
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
        client: The judge (limits of calls and cost hold for everything that it is asked).
        data_dir: holds ``question.jsonl``, ``judge_prompts.jsonl`` and ``reference_answer/gpt-4.jsonl``, as FastChat has them.
        answers: one per model and question.
        folder: written: ``<judge>_single.jsonl`` or ``<judge>_pair.jsonl``, and the calls (``replies.jsonl``...).
        baseline: the model of ``answers`` that the others are compared with (``pairwise-baseline``).
        allow_missing: judgments of a model that may be missing for its scores to be given nonetheless.
        limit: how many questions, from the first on.
        bootstrap: resamples of the intervals.

    Raises:
        UserError: a data file, an answer or the baseline is missing; the judge cannot be asked at all.
    """
    data = fastchat.load_data(data_dir, limit)
    by_question, games = _games(client.spec, data, answers, mode, baseline)
    requests = [request for game in games for request in game.requests]
    client.ask(requests)
    played = [_play(game, client) for game in games]
    records = [record for record, _ in played if record is not None]
    name = f"{client.spec.name.replace(os.sep, '_')}_{'single' if mode == 'single' else 'pair'}.jsonl"
    write_whole(folder / name, "".join(json.dumps(record) + "\n" for record in records))
    scores = {}
    for model in [model for model in answers if mode != "pairwise-baseline" or model != baseline]:
        its = [r for r in records if model in (r.get("model"), r.get("model_1"), r.get("model_2"))]
        single = mode == "single"
        scores[model] = single_rows(model, its, data.questions, bootstrap) if single else pair_rows(model, its, bootstrap)
    missing = _missing(games, [record for record, _ in played])
    rows, notes, refusals = withhold("mt_bench", scores, missing, allow_missing, client.budget.stopped, _reading(client))
    differ = sum(differs for _, differs in played)
    notes = [*_notes(client.spec, mode, data, records, differ), *notes, *client.notes(requests)]
    manifest = describe(client, "mt_bench", bootstrap, requests) | {
        "mode": mode,
        "baseline": baseline,
        "questions": len(data.questions),
        "data": {file.name: file_hash(file) for file in data.files},
        "prompts": {name: facts_hash(prompt) for name, prompt in data.prompts.items()},
        "answers": {
            model: facts_hash([(number, record["choices"][0]["turns"]) for number, record in its.items()])
            for model, its in by_question.items()
        },
    }
    return Judged(rows, notes, refusals, manifest, records)


def estimate_mt_bench(
    judge: JudgeSpec,
    data_dir: Path,
    models: Sequence[str],
    folder: Path,
    *,
    answers: Answers | None = None,
    mode: Mode = "single",
    baseline: str | None = None,
    limit: int | None = None,
) -> Estimate:
    """What ``judge_mt_bench`` would still cost; without ``answers`` each is taken to have 300 tokens."""
    require_sound(judge)
    data = fastchat.load_data(data_dir, limit)
    if answers is None:
        answers = {}
        for model in models:
            text = f"{model} {'x' * (300 * CHARACTERS_PER_TOKEN)}"
            said = [{"question_id": q["question_id"], "choices": [{"turns": [text] * len(q["turns"])}]} for q in data.questions]
            answers[model] = said
    _, games = _games(judge, data, answers, mode, baseline)
    requests = [request for game in games for request in game.requests]
    return estimate(judge, requests, read_replies(folder), identity(judge))


def _by_question(answers: Answers, data: BenchData) -> dict[str, dict[int, Mapping[str, Any]]]:
    """Answers by question id, each with a text for every turn."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for model, records in answers.items():
        its = {record["question_id"]: record for record in records}
        if len(its) < len(records):
            numbers = [record["question_id"] for record in records]
            twice = next(number for number in numbers if numbers.count(number) > 1)
            raise UserError(f"MT-Bench: {model} answers question {twice} twice; keep one of the answers.")
        for question in data.questions:
            number, turns = question["question_id"], len(question["turns"])
            if number not in its:
                raise UserError(f"MT-Bench: {model} has no answer to question {number}; generate its answers again.")
            texts = its[number]["choices"][0]["turns"]
            if len(texts) != turns or not all(isinstance(text, str) for text in texts):
                raise UserError(
                    f"MT-Bench: {model}'s answer to question {number} does not hold a text for each of its {turns} turns."
                )
        found[model] = {question["question_id"]: its[question["question_id"]] for question in data.questions}
    return found


def _games(
    spec: JudgeSpec, data: BenchData, answers: Answers, mode: str, baseline: str | None
) -> tuple[dict[str, dict[int, Mapping[str, Any]]], list[_Game]]:
    """The answers by question, and the games between them."""
    by_question = _by_question(answers, data)
    if mode == "pairwise-baseline" and baseline not in answers:
        raise UserError(
            f"MT-Bench: mode pairwise-baseline compares with baseline, and {baseline!r} is none of the models "
            f"({', '.join(answers)}); name one of them."
        )
    if mode != "single" and len(answers) < 2:
        raise UserError(f"MT-Bench: mode {mode} needs at least two models; with one, use mode single.")
    own = {"temperature": spec.temperature, "max_tokens": spec.max_tokens, "seed": spec.seed}
    own = {key: value for key, value in own.items() if value is not None}
    games = []
    for match in fastchat.make_matches(data, spec.name, by_question, mode, baseline):
        label = f"MT-Bench question {match.question['question_id']}, turn {1 + match.multi_turn}"
        asked = fastchat.asked_by(match)
        theirs = [{"temperature": each.temperature, "max_tokens": each.max_tokens} for each in asked]
        requests = (ChatRequest(a.messages, parameters | own, label=label) for a, parameters in zip(asked, theirs, strict=True))
        games.append(_Game(match, tuple(requests)))
    return by_question, games


def _play(game: _Game, client: ChatClient) -> tuple[Record | None, bool]:
    """FastChat's record of a game as the spec's parser reads it (None while a reply is missing), and whether the other parser
    would read it otherwise."""
    replies = [reply for reply in map(client.reply, game.requests) if reply is not None]
    if len(replies) < len(game.requests):
        return None, False
    record = fastchat.play(game.match, [reply.text for reply in replies])
    record["tstamp"] = max(reply.time for reply in replies)  # so that a rerun writes the same file
    strict = record | strictly(record)
    return strict if client.spec.score_parser == "strict" else record, strict != record


def _missing(games: Sequence[_Game], records: Sequence[Record | None]) -> dict[str, Missing]:
    counts: dict[str, Missing] = {}
    for game, record in zip(games, records, strict=True):
        for model in game.models:
            so_far = counts.get(model, Missing(0, 0, 0))
            unread = record is not None and not is_rated(record)
            example = so_far.example or (unread_text(record) if record is not None and unread else "")
            lacking = so_far.unanswered + (record is None), so_far.unread + unread
            counts[model] = Missing(*lacking, so_far.total + 1, example)
    return counts


def _other_parser(spec: JudgeSpec) -> str:
    return "fastchat" if spec.score_parser == "strict" else "strict"


def _reading(client: ChatClient) -> Reading:
    others = f"another judge, other prompts (judge_prompts.jsonl) or score_parser: {_other_parser(client.spec)}"
    return Reading(f"score_parser {client.spec.score_parser}", others, client.folder / REPLIES)


def _notes(spec: JudgeSpec, mode: str, data: BenchData, records: Sequence[Record], differ: int) -> list[str]:
    other = _other_parser(spec)
    reading = {
        "strict": "the last verdict, ratings within 1 and 10",
        "fastchat": "as FastChat does: the first rating, any size",
    }
    notes = [
        f"MT-Bench ({mode}): score_parser {spec.score_parser} (default: strict) reads {reading[spec.score_parser]}; "
        f"{other} would read {differ} judgments otherwise."
    ]
    outside = sum(is_rated(record) and not LOWEST <= record["score"] <= HIGHEST for record in records if "score" in record)
    if outside:
        notes.append(f"MT-Bench: {outside} ratings lie outside {LOWEST} to {HIGHEST} and are counted as they are.")
    deviations = {
        **other_judge(spec, _OFFICIAL_JUDGE),
        f"{len(data.questions)} questions, not {_OFFICIAL_QUESTIONS}": len(data.questions) != _OFFICIAL_QUESTIONS,
        f"FastChat would read {differ} judgments otherwise": spec.score_parser == "strict" and differ,
        "temperature or max_tokens is not FastChat's": spec.temperature is not None or spec.max_tokens is not None,
    }
    return [*notes, *not_comparable("MT-Bench", deviations)]
