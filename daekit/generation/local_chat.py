"""A chat model in a directory, asked in process with its own chat template."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.errors import UserError
from daekit.files import directory_hashes, facts_hash
from daekit.generation.calls import ChatRequest, Message
from daekit.generation.local import Sampling, device, generate, pad_left
from daekit.models.backbone import frozen_forward
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.vocabulary import vocabulary_size
from daekit.recipe.judge import JudgeSpec
from daekit.recipe.schema import ModelSpec

# temperature, top_p, seed: greedy all the same
_KNOWN = {"max_tokens", "temperature", "top_p", "seed", "logprobs", "top_logprobs"}
_CANDIDATES = 100  # tokens at least among which the likeliest texts are sought
_NO_TEXT = "\N{REPLACEMENT CHARACTER}"


def judge_tokenizer(spec: JudgeSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a local judge; UserError if there is none, or one that cannot chat."""
    tokenizer = load_tokenizer_of(ModelSpec(path=spec.path))
    if not tokenizer.chat_template:
        raise UserError(f"judge.path: {spec.path} has no chat template; a judge must be a chat model.")
    return tokenizer


class LocalChat:
    """Loads the model when it is made; answers greedily."""

    def __init__(self, spec: JudgeSpec) -> None:
        self._spec, self._tokenizer = spec, judge_tokenizer(spec)
        model = load_model(ModelSpec(path=spec.path, dtype=spec.dtype, quantization=spec.quantization))
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        # bitsandbytes has placed its weights already
        self._model: PreTrainedModel = model if spec.quantization else model.to(device())  # type: ignore[arg-type]

    def answer(self, requests: Sequence[ChatRequest]) -> Iterator[tuple[int, str]]:
        """(index, body of a reply), a batch at a time, shortest prompts first.

        Raises:
            UserError: a request asks for what a local judge does not have (logprobs, functions), or is longer than the model
                reads.
        """
        for request in requests:
            _require_possible(request)
        prompts = [encode_chat(self._tokenizer, request.messages) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            if self._limit(prompt, 1) < 1:
                raise UserError(
                    f"judge.path: {request.label or 'a prompt'} has {len(prompt)} tokens, and {self._spec.path} reads "
                    f"{self._context}. "
                    "Take a judge with a longer context, or limit the length of the answers that are judged."
                )
        order = sorted(range(len(requests)), key=lambda at: (requests[at].parameters["max_tokens"], len(prompts[at])))
        while order:
            first = requests[order[0]].parameters
            batch = [at for at in order[: self._spec.batch_size] if requests[at].parameters == first]
            order = order[len(batch) :]
            batch_prompts = [prompts[at] for at in batch]
            tops: list[list[tuple[str, float]] | None] = [None] * len(batch)
            if first.get("logprobs"):
                tops = [*self._next_tokens(batch_prompts, first.get("top_logprobs", 0))]
            limits = [self._limit(prompt, first["max_tokens"]) for prompt in batch_prompts]
            answers = generate(
                self._model,
                self._tokenizer,
                batch_prompts,
                max_new_tokens=max(limits),
                batch_size=len(batch),
                sampling=[Sampling(limit) for limit in limits],
            )
            for at, ids, limit, top in zip(batch, answers, limits, tops, strict=True):
                yield at, self._body(len(prompts[at]), ids, limit, top)

    def _next_tokens(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[tuple[str, float]]]:
        """After each prompt the ``count`` likeliest texts of one token and their log-probabilities; tokens of one text (with
        and without the mark of a word's beginning) are added up."""
        input_ids_BT, mask_BT = pad_left(prompts, padding=0)
        where = self._model.device
        with frozen_forward(self._model):
            logits_BV = self._model(
                input_ids=input_ids_BT.to(where),
                attention_mask=mask_BT.to(where),
                position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0).to(where),
                logits_to_keep=1,
            ).logits[:, -1, : vocabulary_size(self._tokenizer)]
        candidates = min(max(_CANDIDATES, 4 * count), logits_BV.shape[-1])
        likeliest = logits_BV.double().log_softmax(-1).topk(candidates)
        found = []
        for values, ids in zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True):
            texts: dict[str, float] = {}
            for value, token in zip(values, ids, strict=True):
                text = self._tokenizer.decode([token])
                if _NO_TEXT in text:  # a part of a letter: such tokens are not one text
                    text = self._tokenizer.convert_ids_to_tokens(token)
                texts[text] = float(np.logaddexp(texts.get(text, -np.inf), value))
            found.append(sorted(texts.items(), key=lambda item: -item[1])[:count])
        return found

    def _body(self, prompt_tokens: int, ids: list[int], most: int, top: list[tuple[str, float]] | None) -> str:
        """In the form of the OpenAI protocol."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = "length" if len(ids) >= most else "stop"
        if top is not None:
            entries = [{"token": token, "logprob": value, "bytes": None} for token, value in top]
            choice["logprobs"] = {"content": [{"token": text, "bytes": None, "top_logprobs": entries}]}
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(ids)}
        return json.dumps({"model": self._spec.name, "choices": [choice], "usage": usage})

    def _limit(self, prompt: Sequence[int], max_tokens: int) -> int:
        """How long the reply may be: where the context ends, it is cut as at ``max_tokens``."""
        return max_tokens if self._context is None else min(max_tokens, self._context - len(prompt))


def _require_possible(request: ChatRequest) -> None:
    unknown = [name for name in request.parameters if name not in _KNOWN]
    if request.parameters.get("logprobs") and request.parameters["max_tokens"] != 1:
        unknown.append("logprobs of more than one token")
    if unknown:
        raise UserError(
            f"judge.path: a local judge does not know {', '.join(unknown)}, which the annotator asks for. Choose an "
            "annotator that reads the judge's text (annotator: alpaca_eval_gpt4), or serve the model and give its base_url."
        )


def encode_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation in the tokenizer's own chat template, to generate the assistant's turn after.

    Special tokens come from the template alone: what looks like one inside a message (``<|im_end|>`` in an answer that is to
    be judged) is encoded as the text that it is. Everything else is encoded exactly as ``apply_chat_template`` encodes it.
    """
    text, spans = _render(tokenizer, messages)
    encoded, added = tokenizer(text, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast), _added(tokenizer)
    if not any(token in text[start:end] for start, end in spans for token in added.values()):
        return list(encoded["input_ids"])
    if not tokenizer.is_fast:
        raise UserError(
            f"judge.path: an answer holds text that {type(tokenizer).__name__} reads as a special token, and a slow tokenizer "
            "cannot tell them apart; take a judge with a fast tokenizer (tokenizer.json)."
        )
    ids: list[int] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        inside = any(first <= start and end <= last for first, last in spans)
        # a token of its own for an added string, where the template did not write it
        ids += _as_text(tokenizer, text[start:end]) if token in added and inside and end > start else [token]
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it each message's content stands."""
    try:
        text = _apply(tokenizer, messages)
    except TemplateError:
        messages = _system_into_user(messages)  # Mistral's and Gemma's templates know no system message
        text = _apply(tokenizer, messages)
    marks = [f"@@{secrets.token_hex(16)}@@" for _ in messages]
    frame = _apply(tokenizer, [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    for contents in ([m["content"] for m in messages], [m["content"].strip() for m in messages]):  # many templates strip
        spans, rest, built = [], frame, ""
        for mark, content in zip(marks, contents, strict=True):
            before, found, rest = rest.partition(mark)
            if not found:
                break
            built += before + content
            spans.append((len(built) - len(content), len(built)))
        if built + rest == text:
            return text, spans
    raise UserError(
        "judge.path: the chat template of the judge does not write the messages as they are, one after another, so it cannot "
        "be told what belongs to an answer; take another judge, or serve the model and give its base_url."
    )


def _apply(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    text = tokenizer.apply_chat_template(list(map(dict, messages)), tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _system_into_user(messages: Sequence[Message]) -> list[Message]:
    """The system message in front of the first message of the user."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return list(messages)
    first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
    return [first, *messages[2:]]


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}


def _as_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of ``text`` without any added token."""
    added = _added(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if any(token in added for token in ids):  # one that is not marked as special: letter by letter it cannot appear
        ids = [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
    return list(ids)


def model_fingerprint(path: str) -> str:
    """Hash of the weights and settings in a directory, so that a model that was trained again is another model.

    Every byte is read. A hub id has no files here: its name is all that is known.
    """
    hashes = directory_hashes(Path(path).expanduser(), (".safetensors", ".json", ".jinja", ".model"))
    return "hub" if hashes is None else facts_hash(hashes)[:16]
