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
import json
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
Outputs = Sequence[Mapping[str, Any]]  # ``{"instruction", "output"}``, as alpaca_eval has them
OFFICIAL_ANNOTATOR, OFFICIAL_COUNT = "weighted_alpaca_eval_gpt4_turbo", 805
_SUCH_AS = f", such as {OFFICIAL_ANNOTATOR} (logprobs) or alpaca_eval_gpt4 (text)"
_REPOSITORY, _BASELINE, _GAMED = "tatsu-lab/alpaca_eval", "alpaca_eval_gpt4_baseline.json", "df_gamed.csv"
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


def read_annotator(name: str, where: str = "annotator") -> Annotator:
    """The annotator with this name, or in this directory.

    Raises:
        UserError: there is none, or it cannot be asked through an OpenAI-compatible endpoint one prompt at a time; ``where``
            begins it.
    """
    utils, known = module("utils"), Path(module("constants").EVALUATORS_CONFIG_DIR)
    own = Path(name).expanduser()
    directory = own.resolve() if (own / "configs.yaml").is_file() else known / name
    if not (directory / "configs.yaml").is_file():
        names = sorted(path.parent.name for path in known.glob("*/configs.yaml"))
        raise UserError(
            f"{where}: {name!r} is neither one of alpaca_eval's evaluators nor a directory with configs.yaml"
            f"{nearest(name, names) or _SUCH_AS}"
        )
    try:
        configs = yaml.safe_load((directory / "configs.yaml").read_text(encoding="utf-8"))
        config = next(iter(configs.values()))
        arguments, template = config["completions_kwargs"], config["prompt_template"]
        model, text = arguments["model_name"], utils.read_or_return(template, relative_to=directory.parent)
    except (OSError, yaml.YAMLError, AttributeError, StopIteration, TypeError, KeyError) as error:
        raise UserError(f"{where}: {directory / 'configs.yaml'} cannot be read ({type(error).__name__}: {error})") from error
    unknown = [key for key in arguments if key not in _SENT | _OURS]
    foreign = sorted(set(_PLACEHOLDER.findall(text)) - _COLUMNS)
    asks = {
        "several prompts or judges at once": len(configs) > 1 or config.get("batch_size", 1) > 1,
        config.get("fn_completions"): config.get("fn_completions", "openai_completions") != "openai_completions",
        ", ".join(unknown): unknown,
        "a completion of plain text, not an answer in a chat": not text.strip().startswith("<|im_start|>"),
        f"the columns {', '.join(foreign)}": foreign,
    }
    for what, is_asked in asks.items():
        if is_asked:
            raise UserError(f"{where}: {name} asks for {what}, which is not supported. Choose another{_SUCH_AS}.")
    sent = {"temperature": 0.7, "max_tokens": 2048} | {key: arguments[key] for key in arguments if key in _SENT}  # its defaults
    return Annotator(directory.name, directory / "configs.yaml", model, utils.prompt_to_chatml(text), text, sent)


def fill(template: Messages, values: Mapping[str, Any]) -> Messages:
    """The messages of one prompt. What stands in a value is text: it makes no message and is no placeholder."""

    def filled(content: str) -> str:
        return _PLACEHOLDER.sub(lambda found: str(values[found.group(1)]), content).strip()

    return [{**message, "content": filled(message["content"])} for message in template]


class Unreadable(Exception):
    """None of the judge's replies held a preference."""


def prompts_for(annotator: Annotator, reference: Outputs, outputs: Outputs) -> list[Messages]:
    """What comparing ``outputs`` with ``reference`` asks; equal answers are a draw without a question."""

    prompts: list[Messages] = []

    def note(asked: list[Messages]) -> dict[str, list[Any]]:
        prompts.extend(asked)
        raise Unreadable

    with _quiet(), contextlib.suppress(Unreadable):
        _annotator_class(annotator, note)(annotators_config=annotator.config).annotate_head2head(
            outputs_1=list(reference), outputs_2=list(outputs), chunksize=None
        )
    return prompts


def evaluate(
    annotator: Annotator, model: str, reference: Outputs, outputs: Outputs, reply: Callable[[Messages], ChatReply | None]
) -> tuple[Any, list[dict[str, Any]]]:
    """(leaderboard, annotations) of alpaca_eval, in the order of ``reference``; what is missing is None.

    Raises:
        Unreadable: there is no preference at all (alpaca_eval crashes then).
    """

    def complete(prompts: list[Messages]) -> dict[str, list[Any]]:
        replies = [reply(prompt) for prompt in prompts]
        texts = ["" if answer is None else answer.text for answer in replies]
        choices = [{} if answer is None else _choice(answer) for answer in replies]
        unknown = {key: [0.0] * len(prompts) for key in ("price_per_example", "time_per_example")}
        return {"completions": texts, "completions_all": choices, **unknown}

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


def length_controlled(annotator: Annotator, annotations: Outputs, reference: Outputs) -> tuple[list[float], str]:
    """(length-controlled preference of each row in percent, "") where all is official that its model was fitted for, or
    ([], why it is not available)."""
    if annotator.name != OFFICIAL_ANNOTATOR:
        return [], f"it belongs to the annotator {OFFICIAL_ANNOTATOR}"
    if len(reference) != OFFICIAL_COUNT:
        return [], f"it needs all {OFFICIAL_COUNT} official instructions, and there are {len(reference)}"
    if any(row["preference"] is None for row in annotations):
        return [], "judgments are missing"
    glm = module("metrics.glm_winrate")
    try:
        baseline, _ = (
            glm.hf_hub_download(repo_id=_REPOSITORY, filename=file, repo_type="dataset") for file in (_BASELINE, _GAMED)
        )
    except OSError as error:  # no network, offline mode, not in the cache
        return [], f"{_BASELINE} and {_GAMED} of {_REPOSITORY} cannot be had ({type(error).__name__})"
    with open(baseline, encoding="utf-8") as file:
        official = [(row["instruction"], row["output"]) for row in json.load(file)]
    if official != [(row["instruction"], row["output"]) for row in reference]:
        return [], f"the reference outputs are not those of {_BASELINE} in their order"
    frame = module("utils").convert_to_dataframe(list(annotations))
    glm.get_length_controlled_winrate(frame, save_weights_dir=None, is_warn_extreme_changes=False)  # adds a column
    return [100 * float(value) for value in frame["glm_preference"]], ""


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
