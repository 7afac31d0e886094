"""Answers to the questions of MT-Bench and AlpacaEval: in process in batches, or over HTTP; kept in FastChat's format."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from daekit.data.responses import render
from daekit.errors import UserError
from daekit.evaluation.models import SuiteModel
from daekit.evaluation.questions import Conversation
from daekit.files import append_json_lines, damaged_line, read_json_lines, write_json
from daekit.generation import ChatClient, ChatRequest
from daekit.generation.local import Sampling, generate
from daekit.progress import ProgressFunction
from daekit.recipe.judge import JudgeSpec

# What a model says in one turn, without white space at the ends; whether it ended only because no more tokens were allowed.
Turn = tuple[str, bool]
# A conversation, and what the model has said in it so far.
Asked = tuple[Conversation, Sequence[str]]


@dataclass(frozen=True)
class HowToAnswer:
    """What answers depend on besides model and questions.

    Attributes:
        max_new_tokens: The most tokens of each turn.
        system: a system message before the conversation; default: whatever the chat template does without one.
        chat_template_kwargs: further variables of the chat template (``enable_thinking: false``).
        seed: It decides answers that are drawn.
    """

    max_new_tokens: int
    system: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def messages(self, conversation: Conversation, said: Sequence[str]) -> list[dict[str, str]]:
        """The conversation up to the turn after what the model has ``said``."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn, answer in zip(conversation.turns, said, strict=False):
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": conversation.turns[len(said)]}]

    def facts(self) -> dict[str, Any]:
        """For a file."""
        return asdict(self)


class AnswerStore:
    """``<folder>/<model>.jsonl``, one line per conversation, and beside it ``<model>.json`` with what its answers depend on.

    A process that is killed leaves at most one torn line, which is cut when the store is opened next.

    Args:
        facts: JSON-able; equal facts, equal answers.
        write: whether files may be made and cut; without it only what is there is read.

    Raises:
        UserError: the file holds answers of another model, of other questions or settings; a damaged line.
    """

    def __init__(self, folder: Path, model: str, facts: Mapping[str, Any], write: bool = True) -> None:
        self.path, self.model = folder / f"{model}.jsonl", model
        self._claim(folder / f"{model}.json", json.loads(json.dumps(facts)), write)
        records, _ = read_json_lines(self.path, repair=write)
        for number, record in enumerate(records, 1):
            try:
                record["question_id"], record["choices"][0]["finish_reasons"]
            except (KeyError, TypeError, IndexError) as error:
                raise damaged_line(self.path, number, f"it is no answer: {error}") from None
        self.records = {record["question_id"]: record for record in records}

    def missing(self, conversations: Sequence[Conversation]) -> list[Conversation]:
        """Those that are not answered yet."""
        return [each for each in conversations if each.id not in self.records]

    def add(self, answers: Mapping[int, Sequence[Turn]]) -> None:
        """Append the turns of conversations, by id; they are on the disk when this returns."""
        records = []
        for number, said in answers.items():
            reasons = ["length" if cut else "stop" for _, cut in said]
            choice = {"index": 0, "turns": [text for text, _ in said], "finish_reasons": reasons}
            ids = {"question_id": number, "answer_id": uuid.uuid4().hex, "model_id": self.model}
            records.append({**ids, "choices": [choice], "tstamp": time.time()})
        append_json_lines(self.path, records)
        self.records |= {record["question_id"]: record for record in records}

    def cut(self) -> int:
        """How many turns ended only because no more tokens were allowed."""
        return sum(record["choices"][0]["finish_reasons"].count("length") for record in self.records.values())

    def _claim(self, path: Path, facts: Any, write: bool) -> None:
        if path.is_file() and self.path.is_file():
            try:
                theirs = dict(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"{path}: damaged ({error}), so that nothing says what the answers in {self.path} depend on; delete both, "
                    "and the questions are answered again"
                ) from None
            changed = ", ".join(key for key in sorted({*theirs, *facts}) if theirs.get(key) != facts.get(key))
            if changed:
                raise UserError(
                    f"{self.path}: holds answers of another run (its {changed} differ). Give the model another name, choose "
                    f"another output_dir, or delete {self.path}."
                )
        elif write:
            write_json(path, facts)


def require_answerable(model: SuiteModel, conversations: Sequence[Conversation], how: HowToAnswer, where: str) -> None:
    """What can be known before weights are loaded or a call is sent.

    Raises:
        UserError: no chat template, or one that does not take these messages; a question without room for an answer.
    """
    if model.is_endpoint:
        return
    if model.tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer of models.{model.name} has no chat template, so it cannot be asked. Save one beside "
            "it (chat_template.jinja), or measure the model with suites that need none."
        )
    for conversation in conversations:
        for said in range(len(conversation.turns)):
            _prompt(model, conversation, [""] * said, how, where)


def answer_all(
    model: SuiteModel,
    conversations: Sequence[Conversation],
    how: HowToAnswer,
    store: AnswerStore,
    *,
    batch_size: int,
    where: str,
    progress: ProgressFunction = lambda done, total: None,
) -> None:
    """Answer in process the conversations that ``store`` does not hold; each batch is on the disk before the next begins.

    A batch holds conversations whose first prompts are of like length; the longest come first.

    Args:
        progress: called with (conversations answered, all of them).

    Raises:
        UserError: a question without space for an answer.
    """
    missing = store.missing(conversations)
    missing.sort(key=lambda each: len(_prompt(model, each, [], how, where)), reverse=True)
    for start in range(0, len(missing), batch_size):
        _answer(missing[start : start + batch_size], store, lambda asked: _turns(model, asked, how, where))
        progress(len(conversations) - len(store.missing(conversations)), len(conversations))


def _answer(
    conversations: Sequence[Conversation], store: AnswerStore, ask: Callable[[Sequence[Asked]], Sequence[Turn | None]]
) -> None:
    """Ask turn by turn, all conversations at once; those of which all turns are answered (not None) are kept."""
    said: dict[int, list[Turn]] = {each.id: [] for each in conversations}
    for turn in range(max(len(each.turns) for each in conversations)):
        going_on = [each for each in conversations if len(each.turns) > turn == len(said[each.id])]
        answers = ask([(each, [text for text, _ in said[each.id]]) for each in going_on])
        for each, answer in zip(going_on, answers, strict=True):
            if answer is not None:
                said[each.id].append(answer)
    store.add({each.id: said[each.id] for each in conversations if len(said[each.id]) == len(each.turns)})


def _turns(model: SuiteModel, asked: Sequence[Asked], how: HowToAnswer, where: str) -> list[Turn]:
    """The next turn of each conversation, in process, as one batch."""
    tokenizer, context = model.tokenizer, model.context_length
    prompts = [_prompt(model, each, said, how, where) for each, said in asked]
    limits = [how.max_new_tokens if context is None else min(how.max_new_tokens, context - len(prompt)) for prompt in prompts]
    sampling = [
        Sampling(limit, each.temperature, (how.seed, each.id, len(said)))
        for (each, said), limit in zip(asked, limits, strict=True)
    ]
    most, weights = max(limits), model.model()
    answers = generate(weights, tokenizer, prompts, max_new_tokens=most, batch_size=len(prompts), sampling=sampling)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), len(ids) >= limit) for text, ids, limit in zip(texts, answers, limits, strict=True)]


def _prompt(model: SuiteModel, conversation: Conversation, said: Sequence[str], how: HowToAnswer, where: str) -> list[int]:
    messages, who, options = how.messages(conversation, said), f"{where}: models.{model.name}", dict(how.chat_template_kwargs)
    template = options.pop("chat_template", None)
    ids = render(model.tokenizer, messages, who, template=template, options=options, add_generation_prompt=True)["input_ids"]
    if model.context_length is not None and len(ids) >= model.context_length:
        raise UserError(
            f"{where}: turn {len(said) + 1} of question {conversation.id} has {len(ids)} tokens with what was said before, and "
            f"models.{model.name} is made for {model.context_length}: no room for an answer. Lower max_new_tokens, or leave "
            "the model out."
        )
    return ids


def endpoint_of(model: SuiteModel, how: HowToAnswer, max_calls: int | None) -> JudgeSpec:
    """How a model that is served is asked."""
    spec = model.spec
    where = {"model": spec.served_model, "base_url": spec.url, "api_key_env": spec.api_key_env}
    return JudgeSpec(**where, max_tokens=how.max_new_tokens, max_calls=max_calls)


def answer_by_client(
    client: ChatClient, conversations: Sequence[Conversation], how: HowToAnswer, store: AnswerStore, where: str
) -> None:
    """Ask a model that is served, turn by turn, all conversations at once; what it has answered before is not asked again.

    Raises:
        UserError: It did not answer all; what it did answer is kept.
    """

    def ask(asked: Sequence[Asked]) -> list[Turn | None]:
        replies = client.ask([_request(each, said, how) for each, said in asked])
        return [None if reply is None else (reply.text.strip(), reply.is_cut) for reply in replies]

    _answer(conversations, store, ask)
    if lacking := len(store.missing(conversations)):
        raise UserError(
            f"{where}: models.{store.model} ({client.spec.endpoint}) did not answer {lacking} of "
            f"{len(conversations)} questions (why: {client.why()}); what it answered is kept, and the same command asks for "
            "the rest."
        )


def _request(conversation: Conversation, said: Sequence[str], how: HowToAnswer) -> ChatRequest:
    parameters = {"max_tokens": how.max_new_tokens, "temperature": conversation.temperature, "seed": how.seed}
    return ChatRequest(how.messages(conversation, said), parameters, label=f"question {conversation.id}, turn {len(said) + 1}")
