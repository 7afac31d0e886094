"""The one place that touches fschat: its matches, its prompts, its judging functions; without its network code.

fschat is written for openai < 1 and imports ``anthropic``; neither is needed for what is used here. Its functions ask for one
reply at a time, so a match is played twice: first to learn what it asks, then with the replies.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from daekit.environment import replaced
from daekit.errors import UserError

Record = dict[str, Any]
Messages = list[dict[str, str]]
Answers = Mapping[str, Mapping[int, Mapping[str, Any]]]  # model -> question id -> FastChat's answer record
_MATCH_MAKERS = {"single": "make_match_single", "pairwise-baseline": "make_match", "pairwise-all": "make_match_all_pairs"}


@dataclass(frozen=True)
class BenchData:
    """The data files of MT-Bench; ``references``: question id -> answer record."""

    questions: list[dict[str, Any]]
    prompts: dict[str, dict[str, Any]]
    references: dict[int, dict[str, Any]]
    files: list[Path]


def load_data(folder: Path, limit: int | None) -> BenchData:
    """Read the three data files.

    Raises:
        UserError: one is missing or damaged, or a question that needs a reference has none.
    """
    common = _module("common")
    files = [folder / name for name in ("question.jsonl", "judge_prompts.jsonl", "reference_answer/gpt-4.jsonl")]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"MT-Bench: {file} is missing. Set `path` to a folder with question.jsonl, judge_prompts.jsonl and "
                "reference_answer/gpt-4.jsonl; they are in FastChat's repository (Apache-2.0) under fastchat/llm_judge/data."
            )
    try:
        questions = common.load_questions(str(files[0]), None, None)
        prompts = common.load_judge_prompts(str(files[1]))
        references = common.load_model_answers(str(files[2].parent))[files[2].stem]
    except (ValueError, KeyError) as error:
        raise UserError(f"MT-Bench: a data file in {folder} is damaged ({type(error).__name__}: {error})") from error
    for question in questions:
        if question["category"] in common.NEED_REF_CATS and question["question_id"] not in references:
            raise UserError(f"MT-Bench: {files[2]} has no reference for question {question['question_id']}")
    return BenchData(questions[:limit], prompts, references, files)


def make_matches(data: BenchData, judge: str, answers: Answers, mode: str, baseline: str | None) -> list[Any]:
    """FastChat's matches in the order of its ``gen_judgment``: without and with references, first turn, then both."""
    common, matches = _module("common"), _module("gen_judgment")
    make = getattr(matches, _MATCH_MAKERS[mode])
    judges = (matches.make_judge_single if mode == "single" else matches.make_judge_pairwise)(judge, data.prompts)
    with_reference = [q for q in data.questions if q["category"] in common.NEED_REF_CATS]
    without = [q for q in data.questions if q["category"] not in common.NEED_REF_CATS]
    made: list[Any] = []
    for suffix, both_turns in (("", False), ("-mt", True)):
        for kind, questions, references in (("default", without, None), ("math", with_reference, {judge: data.references})):
            chosen = judges[kind + suffix]
            made += make(questions, list(answers), answers, chosen, baseline, references, multi_turn=both_turns)
    return made


def asked_by(match: Any) -> list[tuple[Messages, dict[str, Any]]]:
    """(messages, parameters) of what playing ``match`` sends: one call, or two for a pair (both orders)."""
    asked = []

    def note(messages: Messages, temperature: float, max_tokens: int) -> str:
        asked.append((messages, {"temperature": temperature, "max_tokens": max_tokens}))
        return ""

    _play(match, note)
    return asked


def play(match: Any, texts: Sequence[str]) -> Record:
    """The record that FastChat makes of ``match`` when the judge says ``texts``. Where it finds no rating the score is -1."""
    waiting = iter(texts)
    try:
        return _play(match, lambda *_: next(waiting))
    except SyntaxError:  # it reads a rating as a Python literal, which [[08]] is not
        return {**_play(match, lambda *_: ""), "judgment": texts[0]}


def _play(match: Any, complete: Callable[[Messages, float, int], str]) -> Record:
    """The record of a match whose judge FastChat knows, and for which it calls ``complete`` instead of the network."""
    common = _module("common")
    conversation = importlib.import_module("fastchat.conversation")
    played = common.play_a_match_single if isinstance(match, common.MatchSingle) else common.play_a_match_pair

    def answer(model: str, conv: Any, temperature: float, max_tokens: int, api_dict: object = None) -> str:
        return complete(conv.to_openai_api_messages(), temperature, max_tokens)

    with (
        replaced(common, "OPENAI_MODEL_LIST", (match.judge.model_name,)),
        # for a name that it does not know FastChat takes a template with a canned dialogue
        replaced(common, "get_conversation_template", lambda model: conversation.get_conv_template("chatgpt")),
        replaced(common, "chat_completion_openai", answer),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        return played(match, None)


@cache
def _module(name: str) -> ModuleType:
    """A module of fastchat.llm_judge."""
    if importlib.util.find_spec("fastchat") is None:
        raise UserError("MT-Bench needs fschat, which is not installed: pip install 'daekit[eval]'")
    stub = importlib.util.find_spec("anthropic") is None
    if stub:
        sys.modules["anthropic"] = ModuleType("anthropic")
    try:
        return importlib.import_module(f"fastchat.llm_judge.{name}")
    finally:
        if stub:
            del sys.modules["anthropic"]
