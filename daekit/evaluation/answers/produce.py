"""The answers themselves: in process, batch by batch, or from an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from jinja2 import TemplateError

from daekit.errors import UserError
from daekit.evaluation.answers.conversations import Answer, Conversation, HowToAnswer
from daekit.evaluation.answers.store import AnswerStore
from daekit.evaluation.evaluated import EvaluatedModel
from daekit.generation import Budget, ChatClient, ChatRequest, Permissions
from daekit.generation.budget import ProgressFunction
from daekit.generation.local import Sampling, generate
from daekit.recipe.judge import JudgeSpec


def open_conversations(conversations: Sequence[Conversation], store: AnswerStore) -> list[Conversation]:
    """Those that are not answered yet."""
    return [each for each in conversations if each.id not in store.records]


def require_answerable(subject: EvaluatedModel, conversations: Sequence[Conversation], how: HowToAnswer, where: str) -> None:
    """What can be known before weights are loaded or a call is sent.

    Raises:
        UserError: no chat template, or one that does not take these messages; a question without room for an answer.
    """
    if subject.is_endpoint:
        return
    if subject.tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer of models.{subject.name} has no chat template, so it cannot be asked. Save one beside it "
            "(chat_template.jinja), or measure the model with suites that need none."
        )
    for conversation in conversations:
        for said in range(len(conversation.turns)):
            _prompt(subject, conversation, ["" for _ in range(said)], how, where)


def answer_all(
    subject: EvaluatedModel,
    conversations: Sequence[Conversation],
    how: HowToAnswer,
    store: AnswerStore,
    *,
    batch_size: int,
    where: str,
    calls: Path,
    max_calls: int | None = None,
    budgets: list[Budget] | None = None,
    allowed: Permissions = Permissions(),  # noqa: B008 (frozen)
    progress: ProgressFunction | None = None,
) -> None:
    """Answer the conversations that ``store`` does not hold; each batch is on the disk before the next begins.

    Args:
        calls: folder for the calls to an endpoint.
        max_calls: to an endpoint, at most, those of ``budgets`` included.
        budgets: of what the endpoint was asked before; the one of these calls is added.
        allowed: which keys may be sent to the endpoint.
        progress: called with (conversations answered, all of them) instead of printing lines; of an endpoint: turns.

    Raises:
        UserError: a question without room for an answer; an endpoint that did not answer all (what it did answer is kept).
    """
    missing = open_conversations(conversations, store)
    if not missing:
        return
    if subject.is_endpoint:
        _over_http(subject, missing, how, store, calls, where, max_calls, [] if budgets is None else budgets, allowed, progress)
        return
    done = len(conversations) - len(missing)
    for answers in _in_process(subject, missing, how, batch_size, where):
        store.add(answers)
        done += len(answers)
        if progress is not None:
            progress(done, len(conversations))
        else:
            print(f"[{subject.name}] {where.removeprefix('benchmarks.')}: {done}/{len(conversations)} answered", flush=True)


def _in_process(
    subject: EvaluatedModel, conversations: Sequence[Conversation], how: HowToAnswer, batch_size: int, where: str
) -> Iterator[list[Answer]]:
    """Batches of conversations whose first prompts are of like length, the longest first."""
    lengths = {each.id: len(_prompt(subject, each, [], how, where)) for each in conversations}
    order = sorted(conversations, key=lambda each: lengths[each.id], reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        said: dict[int, list[tuple[str, bool]]] = {each.id: [] for each in batch}
        for turn in range(max(len(each.turns) for each in batch)):
            asked = [each for each in batch if turn < len(each.turns)]
            for each, answer in zip(asked, _one_turn(subject, asked, said, how, where), strict=True):
                said[each.id].append(answer)
        yield [Answer(each.id, *map(tuple, zip(*said[each.id], strict=True))) for each in batch]


def _one_turn(
    subject: EvaluatedModel,
    asked: Sequence[Conversation],
    said: Mapping[int, Sequence[tuple[str, bool]]],
    how: HowToAnswer,
    where: str,
) -> list[tuple[str, bool]]:
    """(text, cut) of the next turn of each conversation."""
    tokenizer, context = subject.tokenizer, subject.context_length
    prompts = [_prompt(subject, each, [text for text, _ in said[each.id]], how, where) for each in asked]
    limits = [how.max_new_tokens if context is None else min(how.max_new_tokens, context - len(prompt)) for prompt in prompts]
    sampling = [
        Sampling(limit, each.temperature, (how.seed, each.id, len(said[each.id])))
        for each, limit in zip(asked, limits, strict=True)
    ]
    answers = generate(
        subject.model(), tokenizer, prompts, max_new_tokens=max(limits), batch_size=len(prompts), sampling=sampling
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), len(ids) >= limit) for text, ids, limit in zip(texts, answers, limits, strict=True)]


def _prompt(
    subject: EvaluatedModel, conversation: Conversation, said: Sequence[str], how: HowToAnswer, where: str
) -> list[int]:
    try:
        ids: list[int] = subject.tokenizer.apply_chat_template(
            how.messages(conversation, said),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            **how.chat_template_kwargs,
        )["input_ids"]
    except TemplateError as error:
        raise UserError(
            f"{where}: the chat template of models.{subject.name} does not take the conversation: {error}"
        ) from error
    if subject.context_length is not None and len(ids) >= subject.context_length:
        raise UserError(
            f"{where}: turn {len(said) + 1} of question {conversation.id} has {len(ids)} tokens with what was said before, and "
            f"models.{subject.name} is made for {subject.context_length}: no room for an answer. Lower max_new_tokens, or "
            f"leave the model out."
        )
    return ids


def _over_http(
    subject: EvaluatedModel,
    conversations: Sequence[Conversation],
    how: HowToAnswer,
    store: AnswerStore,
    calls: Path,
    where: str,
    max_calls: int | None,
    budgets: list[Budget],
    allowed: Permissions,
    progress: ProgressFunction | None,
) -> None:
    """Turn by turn, all conversations at once; replies that are on the disk are not asked for again."""
    spec = subject.spec
    endpoint = JudgeSpec(
        model=spec.served_model,
        base_url=spec.url,
        api_key_env=spec.api_key_env,
        max_tokens=how.max_new_tokens,
        max_calls=max_calls,
    )
    said: dict[int, list[tuple[str, bool]]] = {each.id: [] for each in conversations}
    role = f"models.{subject.name}"
    with ChatClient(endpoint, calls, role=role, before=budgets, allowed=allowed, progress=progress) as client:
        budgets.append(client.budget)
        for turn in range(max(len(each.turns) for each in conversations)):
            asked = [each for each in conversations if len(each.turns) > turn == len(said[each.id])]
            requests = [_request(each, [text for text, _ in said[each.id]], how) for each in asked]
            for each, reply in zip(asked, client.ask(requests), strict=True):
                if reply is not None:
                    said[each.id].append((reply.text.strip(), reply.is_cut))
    whole = [each for each in conversations if len(said[each.id]) == len(each.turns)]
    store.add([Answer(each.id, *map(tuple, zip(*said[each.id], strict=True))) for each in whole])
    if len(whole) < len(conversations):
        raise UserError(
            f"{where}: models.{subject.name} ({spec.url}) did not answer {len(conversations) - len(whole)} of "
            f"{len(conversations)} questions "
            f"(why: {calls / 'errors.jsonl'}); what it answered is kept, and the same command asks for the rest."
        )


def _request(conversation: Conversation, said: Sequence[str], how: HowToAnswer) -> ChatRequest:
    parameters = {"max_tokens": how.max_new_tokens, "temperature": conversation.temperature, "seed": how.seed}
    return ChatRequest(how.messages(conversation, said), parameters, label=f"question {conversation.id}, turn {len(said) + 1}")
