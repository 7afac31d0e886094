"""The answers themselves: in process, batch by batch, or from an endpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jinja2 import TemplateError

from daekit.errors import UserError
from daekit.evaluation.answers.conversations import Answer, Conversation, HowToAnswer
from daekit.evaluation.answers.store import AnswerStore
from daekit.evaluation.evaluated import EvaluatedModel
from daekit.generation import ChatClient, ChatRequest
from daekit.generation.local import Sampling, generate
from daekit.progress import ProgressFunction
from daekit.recipe.judge import JudgeSpec


def open_conversations(conversations: Sequence[Conversation], store: AnswerStore) -> list[Conversation]:
    """Those that are not answered yet."""
    return [each for each in conversations if each.id not in store.records]


def require_answerable(evaluated: EvaluatedModel, conversations: Sequence[Conversation], how: HowToAnswer, where: str) -> None:
    """What can be known before weights are loaded or a call is sent.

    Raises:
        UserError: no chat template, or one that does not take these messages; a question without room for an answer.
    """
    if evaluated.is_endpoint:
        return
    if evaluated.tokenizer.chat_template is None:
        raise UserError(
            f"{where}: the tokenizer of models.{evaluated.name} has no chat template, so it cannot be asked. Save one beside "
            "it (chat_template.jinja), or measure the model with suites that need none."
        )
    for conversation in conversations:
        for said in range(len(conversation.turns)):
            _prompt(evaluated, conversation, ["" for _ in range(said)], how, where)


def answer_all(
    evaluated: EvaluatedModel,
    conversations: Sequence[Conversation],
    how: HowToAnswer,
    store: AnswerStore,
    *,
    batch_size: int,
    where: str,
    progress: ProgressFunction | None = None,
) -> None:
    """Answer in process the conversations that ``store`` does not hold; each batch is on the disk before the next begins.

    Args:
        progress: Called with (conversations answered, all of them) instead of printing lines.

    Raises:
        UserError: A question without space for an answer.
    """
    missing = open_conversations(conversations, store)
    done = len(conversations) - len(missing)
    for answers in _in_process(evaluated, missing, how, batch_size, where):
        store.add(answers)
        done += len(answers)
        if progress is not None:
            progress(done, len(conversations))
        else:
            print(f"[{evaluated.name}] {where.removeprefix('benchmarks.')}: {done}/{len(conversations)} answered", flush=True)


def _in_process(
    evaluated: EvaluatedModel, conversations: Sequence[Conversation], how: HowToAnswer, batch_size: int, where: str
) -> Iterator[list[Answer]]:
    """Batches of conversations whose first prompts are of like length, the longest first."""
    lengths = {each.id: len(_prompt(evaluated, each, [], how, where)) for each in conversations}
    order = sorted(conversations, key=lambda each: lengths[each.id], reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        said: dict[int, list[tuple[str, bool]]] = {each.id: [] for each in batch}
        for turn in range(max(len(each.turns) for each in batch)):
            asked = [each for each in batch if turn < len(each.turns)]
            for each, answer in zip(asked, _one_turn(evaluated, asked, said, how, where), strict=True):
                said[each.id].append(answer)
        yield [Answer(each.id, *map(tuple, zip(*said[each.id], strict=True))) for each in batch]


def _one_turn(
    evaluated: EvaluatedModel,
    asked: Sequence[Conversation],
    said: Mapping[int, Sequence[tuple[str, bool]]],
    how: HowToAnswer,
    where: str,
) -> list[tuple[str, bool]]:
    """(text, cut) of the next turn of each conversation."""
    tokenizer, context = evaluated.tokenizer, evaluated.context_length
    prompts = [_prompt(evaluated, each, [text for text, _ in said[each.id]], how, where) for each in asked]
    limits = [how.max_new_tokens if context is None else min(how.max_new_tokens, context - len(prompt)) for prompt in prompts]
    sampling = [
        Sampling(limit, each.temperature, (how.seed, each.id, len(said[each.id])))
        for each, limit in zip(asked, limits, strict=True)
    ]
    answers = generate(
        evaluated.model(), tokenizer, prompts, max_new_tokens=max(limits), batch_size=len(prompts), sampling=sampling
    )
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), len(ids) >= limit) for text, ids, limit in zip(texts, answers, limits, strict=True)]


def _prompt(
    evaluated: EvaluatedModel, conversation: Conversation, said: Sequence[str], how: HowToAnswer, where: str
) -> list[int]:
    try:
        ids: list[int] = evaluated.tokenizer.apply_chat_template(
            how.messages(conversation, said),
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            **how.chat_template_kwargs,
        )["input_ids"]
    except TemplateError as error:
        raise UserError(
            f"{where}: the chat template of models.{evaluated.name} does not take the conversation: {error}"
        ) from error
    if evaluated.context_length is not None and len(ids) >= evaluated.context_length:
        raise UserError(
            f"{where}: turn {len(said) + 1} of question {conversation.id} has {len(ids)} tokens with what was said before, and "
            f"models.{evaluated.name} is made for {evaluated.context_length}: no room for an answer. Lower max_new_tokens, or "
            f"leave the model out."
        )
    return ids


def endpoint_of(evaluated: EvaluatedModel, how: HowToAnswer, max_calls: int | None) -> JudgeSpec:
    """How a model that is served is asked."""
    spec = evaluated.spec
    return JudgeSpec(
        model=spec.served_model,
        base_url=spec.url,
        api_key_env=spec.api_key_env,
        max_tokens=how.max_new_tokens,
        max_calls=max_calls,
    )


def answer_by_client(
    client: ChatClient, conversations: Sequence[Conversation], how: HowToAnswer, store: AnswerStore, where: str
) -> None:
    """Ask a model that is served, turn by turn, all conversations at once; what it has answered before is not asked again.

    Raises:
        UserError: It did not answer all; what it did answer is kept.
    """
    said: dict[int, list[tuple[str, bool]]] = {each.id: [] for each in conversations}
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
            f"{where}: models.{store.model} ({client.spec.endpoint}) did not answer {len(conversations) - len(whole)} of "
            f"{len(conversations)} questions (why: {client.folder / 'errors.jsonl'}); what it answered is kept, and the same "
            "command asks for the rest."
        )


def _request(conversation: Conversation, said: Sequence[str], how: HowToAnswer) -> ChatRequest:
    parameters = {"max_tokens": how.max_new_tokens, "temperature": conversation.temperature, "seed": how.seed}
    return ChatRequest(how.messages(conversation, said), parameters, label=f"question {conversation.id}, turn {len(said) + 1}")
