"""A chat with several models at once: one prompt, every model's answer beside the others."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TextIO
from urllib.parse import urlsplit

from daekit.data.prompts import load_prompts
from daekit.errors import UserError, listed
from daekit.evaluation.models import SuiteModel
from daekit.generation import Permissions
from daekit.generation.local import Sampling
from daekit.generation.stream import EndpointSpeaker, LocalSpeaker, Speaker
from daekit.recipe.generated import PromptsSpec
from daekit.recipe.suite import SuiteModelSpec
from daekit.recipe.validation import missing
from daekit.runtime.columns import display

_HELP = "/reset begins a new conversation, /quit or Ctrl-D ends, Ctrl-C stops an answer"


@dataclass
class Chat:
    """Conversations with several models, in step: each model sees its own answers.

    Attributes:
        speakers: name -> who answers.
        system: a system message; None: whatever the chat templates do without one.
        how: length and temperature of answers.
        failed: name -> why there is no answer, of those that failed when they were last asked.
    """

    speakers: Mapping[str, Speaker]
    how: Sampling
    system: str | None = None
    said: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        start = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.said = {name: [*start] for name in self.speakers}

    def ask(self, turns: Sequence[Mapping[str, str]], out: TextIO | None) -> dict[str, str]:
        """Ask every model at the same time; what they say is shown on ``out`` as it comes. Ctrl-C stops the answers.

        Args:
            turns: what is said next, the last by the user.

        Returns:
            Name -> answer. One that failed is shown as such, and its model forgets the turn.
        """
        names, pieces, stop = list(self.speakers), queue.SimpleQueue[tuple[int, str | None]](), threading.Event()
        answers: dict[str, str] = {}
        self.failed = {}

        def speak(column: int, name: str) -> None:
            messages = [*self.said[name], *map(dict, turns)]
            try:
                answers[name] = self.speakers[name].answer(messages, self.how, lambda piece: pieces.put((column, piece)), stop)
                self.said[name] = [*messages, {"role": "assistant", "content": answers[name]}]
            except Exception as error:  # a defect in one model's thread is shown, and the others go on
                self.failed[name] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                answers[name] = f"[no answer: {self.failed[name]}]"
                pieces.put((column, answers[name]))
            finally:
                pieces.put((column, None))

        with _stopped_by_interrupt(stop):
            for column, name in enumerate(names):
                threading.Thread(target=speak, args=(column, name), daemon=True).start()
            shown, speaking = None if out is None else display(out, names), len(names)
            while speaking:
                column, piece = pieces.get()
                speaking -= piece is None
                if shown is not None and piece is None:
                    shown.end(column)
                elif shown is not None and piece is not None:
                    shown.add(column, piece)
        return {name: answers[name] for name in names}


@contextmanager
def _stopped_by_interrupt(stop: threading.Event) -> Iterator[None]:
    """While inside, Ctrl-C sets ``stop``, whatever it falls into; a second one is KeyboardInterrupt."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.getsignal(signal.SIGINT)
    if before is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield  # nobody is to be interrupted, or this thread cannot be
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def talk(chat: Chat, out: TextIO) -> None:
    """Ask for prompts until the user ends."""
    print(f"{listed(chat.speakers)}. {_HELP}.", file=out, flush=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print(file=out)
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}.", file=out, flush=True)
            continue
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
            print("A new conversation.", file=out, flush=True)
        elif line.startswith("/"):
            print(f"{_HELP}.", file=out, flush=True)
        elif line:
            chat.ask([{"role": "user", "content": line}], out)


def answer_prompts(chat: Chat, prompts: Sequence[Sequence[Mapping[str, str]]], out: TextIO) -> int:
    """Write every model's answer to each prompt, each in a conversation of its own, as Markdown. Returns how many there are."""
    answered = 0
    out.write(f"# Answers of {listed(chat.speakers)}\n")
    for number, turns in enumerate(prompts, 1):
        chat.reset()
        answers = chat.ask(turns, None)
        answered += len(answers) - len(chat.failed)
        out.write(f"\n## {number}\n\n" + "\n\n".join(f"{turn['role']}:\n\n{_quoted(turn['content'])}" for turn in turns) + "\n")
        out.writelines(f"\n### {name}\n\n{_quoted(answer)}\n" for name, answer in answers.items())
        out.flush()
    return answered


def read_prompts(path: str) -> list[list[dict[str, Any]]]:
    """The prompts of a file: of rows as sources have them (``prompt`` or ``messages``), or of a text file, one on each line.

    Raises:
        UserError: no such file, no prompts in it.
    """
    file = Path(path).expanduser()
    if file.suffix != ".txt":
        return [row["prompt"] for row in load_prompts("--prompts", PromptsSpec(path=path, chat=True))]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts: {path} cannot be read ({error})") from error
    prompts = [[{"role": "user", "content": line.strip()}] for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts: {path} holds no prompts, one on each line")
    return prompts


def keys_of(models: Mapping[str, str], named: Sequence[str]) -> dict[str, str]:
    """Name of an endpoint -> environment variable with its key. ``NAME`` alone is of the one host that is asked.

    Raises:
        UserError: a model that is no endpoint; several hosts, or none, for one ``NAME``.
    """
    endpoints = {name: text for name, text in models.items() if text.startswith(("http://", "https://"))}
    keys: dict[str, str] = {}
    for text in named:
        name, _, variable = text.rpartition("=")
        if name and name not in endpoints:
            raise UserError(f"--key-env {text}: {name!r} is no endpoint of this chat (there are: {listed(endpoints)})")
        if not name and len({urlsplit(url).netloc for url in endpoints.values()}) != 1:
            raise UserError(
                f"--key-env {text}: a key belongs to one host. Say whose it is: --key-env MODEL={variable} (endpoints of this "
                f"chat: {listed(endpoints)})"
            )
        keys |= dict.fromkeys([name] if name else endpoints, variable)
    return keys


def speakers_of(models: Mapping[str, str], allowed: Permissions, keys: Mapping[str, str] | None = None) -> dict[str, Speaker]:
    """Name -> who answers. ``RUN:STAGE`` is the result of a stage in the output directory of a run.

    ``keys``: name of an endpoint -> environment variable that holds its key.

    Raises:
        UserError: no model there, or one that cannot chat; a key that is missing or may not be sent.
    """
    evaluated = {name: SuiteModel(name, _subject(text)) for name, text in models.items()}
    for name, model in evaluated.items():
        if not model.is_endpoint:
            model.require_there()
            if model.tokenizer.chat_template is None:
                raise UserError(f"{models[name]}: its tokenizer has no chat template, so it cannot chat")
        elif model.spec.served_model is None:
            raise UserError(f"{models[name]}: say which model of the endpoint: {model.spec.url}#MODEL-NAME")
    speakers: dict[str, Speaker] = {}
    for name, model in evaluated.items():
        spec = model.spec
        if spec.url is not None:
            speakers[name] = EndpointSpeaker(name, spec.url, str(spec.served_model), (keys or {}).get(name), allowed)
        else:
            speakers[name] = LocalSpeaker(model.model(), model.tokenizer, model.context_length)
    return speakers


def _subject(text: str) -> SuiteModelSpec:
    run, colon, stage = text.rpartition(":")
    stages = Path(run).expanduser() / "stages"
    if not colon or Path(text).expanduser().exists() or not stages.is_dir():
        spec = SuiteModelSpec.model_validate(text)
        for path in (spec.path, spec.adapter):
            if any(missing((), path)):
                raise UserError(
                    f"{text}: there is no directory {path}; give a directory, a hub id, RUN:STAGE or https://HOST/v1#MODEL"
                )
        return spec
    name, _, checkpoint = stage.partition("@")
    folder = stages / name / (checkpoint or "model")
    if not folder.is_dir():
        there = sorted(str(path.parent.name) for path in stages.glob("*/model"))
        raise UserError(f"{text}: there is no {folder} (complete stages: {listed(there)})")
    return SuiteModelSpec(path=str(folder))


def _quoted(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n"))
