"""The one place that touches alpaca_eval: its annotators, prompts, parsers and metrics; without its network code and caches.

Two things are done otherwise. A prompt becomes messages *before* answers are put in, and all answers at once: alpaca_eval cuts
the finished text at ``<|im_end|>``, and fills one placeholder after another, so that an answer could end the prompt or place
the other's answer. And replies come from our client.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from daekit.errors import UserError, nearest
from daekit.generation.calls import ChatReply

Messages = list[dict[str, str]]
_PLACEHOLDER = re.compile(r"{([^ \s]+?)}")  # alpaca_eval's
_COLUMNS = {"instruction", "output_1", "output_2"}
_SENT = {"max_tokens", "temperature", "top_p", "logprobs", "top_logprobs", "tools", "tool_choice", "stop", "seed"}
_OURS = {"model_name", "requires_chatml", "price_per_token", "client_kwargs", "num_procs", "is_strip", "batch_size"}


@dataclass(frozen=True)
class Annotator:
    """One of alpaca_eval's evaluator configs.

    Attributes:
        config: its ``configs.yaml``.
        model: the judge that it was made for.
        template: messages with placeholders.
        template_text: the same, as alpaca_eval reads it.
        parameters: what is sent besides the messages.
    """

    name: str
    config: Path
    model: str
    template: Messages
    template_text: str
    parameters: dict[str, Any]


def read_annotator(name: str) -> Annotator:
    """The annotator with this name, or in this directory.

    Raises:
        UserError: there is none, or it cannot be asked through an OpenAI-compatible endpoint one prompt at a time.
    """
    utils, known = module("utils"), Path(module("constants").EVALUATORS_CONFIG_DIR)
    own = Path(name).expanduser()
    directory = own.resolve() if (own / "configs.yaml").is_file() else known / name
    if not (directory / "configs.yaml").is_file():
        names = sorted(path.parent.name for path in known.glob("*/configs.yaml"))
        raise UserError(
            f"annotator: {name!r} is neither one of alpaca_eval's evaluators nor a directory with configs.yaml"
            f"{nearest(name, names)}"
        )
    try:
        configs = yaml.safe_load((directory / "configs.yaml").read_text(encoding="utf-8"))
        config = next(iter(configs.values()))
        arguments, template = config["completions_kwargs"], config["prompt_template"]
        model, text = arguments["model_name"], utils.read_or_return(template, relative_to=directory.parent)
    except (OSError, yaml.YAMLError, AttributeError, StopIteration, TypeError, KeyError) as error:
        raise UserError(f"annotator: {directory / 'configs.yaml'} cannot be read ({type(error).__name__}: {error})") from error
    if len(configs) > 1 or config.get("batch_size", 1) > 1:
        raise UserError(f"annotator: {name} {_asks('several prompts or judges at once')}")
    if config.get("fn_completions", "openai_completions") != "openai_completions":
        raise UserError(f"annotator: {name} {_asks(config['fn_completions'])}")
    unknown = [key for key in arguments if key not in _SENT | _OURS]
    if unknown:
        raise UserError(f"annotator: {name} {_asks(', '.join(unknown))}")
    if not text.strip().startswith("<|im_start|>"):
        raise UserError(f"annotator: {name} {_asks('a completion of plain text, not an answer in a chat')}")
    foreign = set(_PLACEHOLDER.findall(text)) - _COLUMNS
    if foreign:
        raise UserError(f"annotator: {name} {_asks('the columns ' + ', '.join(sorted(foreign)))}")
    sent = {"temperature": 0.7, "max_tokens": 2048} | {key: arguments[key] for key in arguments if key in _SENT}  # its defaults
    return Annotator(directory.name, directory / "configs.yaml", model, utils.prompt_to_chatml(text), text, sent)


def _asks(what: str) -> str:
    return (
        f"asks for {what}, which is not supported. Choose another, such as weighted_alpaca_eval_gpt4_turbo (logprobs) or "
        "alpaca_eval_gpt4 (text)."
    )


def fill(template: Messages, values: Mapping[str, Any]) -> Messages:
    """The messages of one prompt. What stands in a value is text: it makes no message and is no placeholder."""

    def filled(content: str) -> str:
        return _PLACEHOLDER.sub(lambda found: str(values[found.group(1)]), content).strip()

    return [{**message, "content": filled(message["content"])} for message in template]


class Unreadable(Exception):
    """None of the judge's replies held a preference."""


class _Prompts(Exception):
    def __init__(self, prompts: list[Messages]) -> None:
        super().__init__()
        self.prompts = prompts


def prompts_for(
    annotator: Annotator, reference: Sequence[Mapping[str, Any]], outputs: Sequence[Mapping[str, Any]]
) -> list[Messages]:
    """What comparing ``outputs`` with ``reference`` asks; equal answers are a draw without a question."""

    def note(prompts: list[Messages]) -> dict[str, list[Any]]:
        raise _Prompts(prompts)

    try:
        with _quiet():
            _annotator_class(annotator, note)(annotators_config=annotator.config).annotate_head2head(
                outputs_1=list(reference), outputs_2=list(outputs), chunksize=None
            )
    except _Prompts as asked:
        return asked.prompts
    return []


def evaluate(
    annotator: Annotator,
    model: str,
    reference: Sequence[Mapping[str, Any]],
    outputs: Sequence[Mapping[str, Any]],
    reply: Callable[[Messages], ChatReply | None],
) -> tuple[Any, list[dict[str, Any]]]:
    """(leaderboard, annotations) of alpaca_eval, in the order of ``reference``; what is missing is None.

    Raises:
        Unreadable: there is no preference at all (alpaca_eval crashes then).
    """

    def complete(prompts: list[Messages]) -> dict[str, list[Any]]:
        replies = [reply(prompt) for prompt in prompts]
        texts = ["" if answer is None else answer.text for answer in replies]
        choices = [{} if answer is None else _choice(answer) for answer in replies]
        nothing = [0.0] * len(prompts)
        return {
            "completions": texts,
            "completions_all": choices,
            "price_per_example": nothing,
            "time_per_example": list(nothing),
        }

    with _quiet():
        leaderboard, annotations = module("main").evaluate(
            model_outputs=list(outputs),
            reference_outputs=list(reference),
            annotators_config=annotator.config,
            name=model,
            output_path=None,
            precomputed_leaderboard=None,
            is_return_instead_of_print=True,
            fn_metric="get_winrate",
            sort_by="win_rate",
            is_cache_leaderboard=False,
            annotation_kwargs={"chunksize": None},
            Annotator=_annotator_class(annotator, complete),
        )
    return leaderboard, [{key: None if value != value else value for key, value in row.items()} for row in annotations]


def _choice(reply: ChatReply) -> dict[str, Any]:
    """What alpaca_eval's parsers read."""
    tokens = (reply.prompt_tokens or 0) + (reply.completion_tokens or 0)
    choice: dict[str, Any] = {"text": reply.text, "total_tokens": tokens}
    if reply.top_logprobs is not None:
        choice["logprobs"] = {"content": [{"top_logprobs": reply.top_logprobs}]}
    return choice


def _annotator_class(annotator: Annotator, complete: Callable[[list[Messages]], dict[str, list[Any]]]) -> Any:
    """alpaca_eval's annotator with our prompts and ``complete`` for its network code, and without its cache."""
    theirs = module("annotators")

    class Single(theirs.SinglePairwiseAnnotator):  # type: ignore[misc, name-defined]
        def _make_prompts(self, df_to_annotate: Any, prompt_template: str | None = None) -> tuple[list[Messages], Any]:
            return [fill(annotator.template, row) for row in df_to_annotate.to_dict("records")], df_to_annotate

        def _parse_completions(self, completions: list[Any]) -> tuple[list[Any], list[Any]]:
            preferences, kept = super()._parse_completions(completions)
            if all(preference is None or preference != preference for preference in preferences):  # None or NaN
                raise Unreadable
            return preferences, kept

    class Pairwise(theirs.PairwiseAnnotator):  # type: ignore[misc, name-defined]
        SingleAnnotator = Single

        def __init__(self, annotators_config: Path) -> None:
            super().__init__(annotators_config=annotators_config, caching_path=None)  # its cache would lie in site-packages
            for single in self.annotators.values():
                single.fn_completions = lambda prompts: complete(prompts)
                single.completions_kwargs = {}

    return Pairwise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars and logs; what fails is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


@cache
def module(name: str) -> ModuleType:
    """A module of alpaca_eval; its import changes neither the environment nor the logging of this process."""
    if importlib.util.find_spec("alpaca_eval") is None:
        raise UserError("AlpacaEval needs alpaca-eval, which is not installed: pip install 'daekit[eval]'")
    if importlib.util.find_spec("pkg_resources") is None:
        raise UserError(
            "AlpacaEval: alpaca-eval needs pkg_resources, which setuptools 82 left out: pip install 'setuptools<82'"
        )
    environment, level = dict(os.environ), logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that pkg_resources is deprecated
            return importlib.import_module(f"alpaca_eval.{name}")
    finally:
        for key in os.environ.keys() - environment.keys():  # of a .env file that it looks for
            del os.environ[key]
        logging.root.setLevel(level)
