"""The generated sources of a recipe: what can be checked before, which are there, and the writing of those that are not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from daekit.data.prompts import load_prompts, prompts_of
from daekit.data.responses import render, template_options
from daekit.errors import UserError
from daekit.evaluation.models import tokenizer_fingerprint
from daekit.files import facts_hash, file_hash, write_json, write_whole
from daekit.generation import ChatClient
from daekit.generation.caller import require_answering
from daekit.generation.drafts import DraftStore, NearDuplicates
from daekit.generation.user_turn import UserTurn
from daekit.generation.writing import Author, EndpointAuthor, LocalAuthor, Prompt, write_rows
from daekit.models.adapters import base_spec, config_of, load_continued, tokenizer_spec
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.placement import free_memory
from daekit.models.vocabulary import differences
from daekit.recipe import generated_key
from daekit.recipe.generated import GeneratedSpec
from daekit.recipe.judge import JudgeSpec
from daekit.recipe.schema import ModelSpec, Recipe
from daekit.report.provenance import commit, versions
from daekit.runtime.caches import contents
from daekit.runtime.data import DataBuilder
from daekit.runtime.folders import read_file
from daekit.runtime.models import ModelBuilder, require_files

_END = 2  # tokens behind an answer in a training row, at most: the end of turn and a line break
_POLL = 1.0  # seconds between two looks of a rank that waits for the rows


class GeneratedSource:
    """One generated source of a run.

    Args:
        models: the models of the run; they say which stages are complete, and their rows give prompts of other sources.
        name: name of the source.
    """

    def __init__(self, models: ModelBuilder, name: str) -> None:
        self.models, self.data, self.name = models, models.data, name
        self.where = f"sources.{name}.generated"  # begins its messages
        spec = models.recipe.sources[name].generated
        assert spec is not None
        self.spec: GeneratedSpec = spec
        self.longest = 0  # tokens of its longest row at most, once it has been checked

    @property
    def is_possible(self) -> bool:
        """Whether the model that writes is there: not the result of a stage that is still to be trained."""
        return self.spec.model.url is not None or self.models.is_there(self.spec.model)

    @property
    def waits_for(self) -> str | None:
        """A stage that must be complete before it can be written; None if it can be."""
        return self.models.folder.first_missing(sorted(self.spec.stages()))

    def find(self) -> Path | None:
        """The file with its rows, if they are all written; ``data`` knows it from then on.

        Raises:
            UserError: they have been changed since.
        """
        if not self.is_possible:
            return None
        done, rows = self._home / "source.json", self._home / "rows.jsonl"
        if not done.is_file() or not rows.is_file():
            return None
        facts = read_file(done, delete=self._home)
        if facts["rows"] != self.spec.rows:
            return None
        if facts["hash"] != file_hash(rows):
            raise UserError(
                f"{rows}: has changed since it was written. Put it back, or delete {done}: the rows are written again from the "
                "attempts that are kept. (To train on rows of your own, name the file as `path`.)"
            )
        self.data.written[self.name] = rows
        return rows

    def check(self) -> None:
        """Everything that can be known before a model is loaded.

        Raises:
            UserError: no model there; a template without a user's turn to open; prompts that leave no room for an answer...
        """
        spec, model = self.spec, self.spec.model
        if spec.near_duplicates is not None:
            NearDuplicates(spec.near_duplicates)
        if model.url is not None:
            if self.find() is None:
                require_answering(f"{self.where}.model", self._endpoint, self.models.allowed)
        elif self.is_possible and self._base.path is not None:
            config_of(self._base)
            require_files(self._base.path)
        prompt = self.longest_prompt()
        context = None if model.url is not None else getattr(self.models.config(model), "max_position_embeddings", None)
        if context is not None and prompt + spec.max_new_tokens > context:
            raise UserError(
                f"{self.where}: its longest prompt has {prompt:,} tokens, which with max_new_tokens={spec.max_new_tokens} is "
                f"more than the {context:,} that the model reads; lower it, or shorten the prompts"
            )
        self.longest = prompt + spec.max_new_tokens + _END

    def write(self) -> Path:
        """Write what is missing of its rows; of several ranks the main process writes and the others wait.

        Raises:
            UserError: too few rows come of the attempts; what the model, its endpoint or the prompts are refused for.
        """
        if (found := self.find()) is not None:
            return found
        if not PartialState().is_main_process:
            while (found := self.find()) is None:  # no barrier: it would time out
                time.sleep(_POLL)
            return found
        start = time.perf_counter()
        prompts = [] if self.spec.prompts.written is not None else self.prompts
        store, rows = DraftStore(self._home / "attempts.jsonl"), self._home / "rows.jsonl"
        counts = write_rows(self._author, prompts, self.spec, store, self.where)
        free_memory()
        seconds = time.perf_counter() - start
        write_whole(rows, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in store.rows(counts.kept)))
        facts = {"counts": counts.facts(), "seconds": round(seconds, 1), "versions": versions(), "commit": commit()}
        facts |= {"rows": self.spec.rows, "hash": file_hash(rows), "facts": self._facts}
        write_json(self._home / "source.json", facts)
        self.data.written[self.name] = rows
        print(f"[{self.where}] {counts}, {seconds:.0f} s -> {rows}", flush=True)
        return rows

    @cached_property
    def prompts(self) -> list[dict[str, Any]]:
        """The prompts that are answered, each in a form that the model takes."""
        spec = self.spec.prompts
        where = f"{self.where}.prompts"
        if spec.source is not None:
            prompts = prompts_of(self.data.source(spec.source)[0], f"{where}.source", spec.limit)
        else:
            prompts = load_prompts(where, spec)
        served = self.spec.model.url is not None
        if served and not all(
            isinstance(prompt["prompt"], list) and not prompt.keys() & {"tools", "chat_template_kwargs"} for prompt in prompts
        ):
            raise UserError(f"{where}: an endpoint answers messages without tools; set `chat: true`, or give rows of messages")
        if self.spec.rows is not None and self.spec.rows > len(prompts) and self.spec.temperature == 0:
            raise UserError(
                f"{self.where}.rows: {self.spec.rows} rows of {len(prompts)} prompts at temperature 0 would be the same rows "
                "again; ask for fewer, or draw them (temperature: 1)"
            )
        return prompts

    def encode(self, prompt: Prompt) -> list[int]:
        """The tokens of a prompt, as a training row begins."""
        if isinstance(prompt["prompt"], str):
            ids: list[int] = self.tokenizer(prompt["prompt"])["input_ids"]
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        options, where = template_options(prompt), f"{self.where}.prompts"
        return render(self.tokenizer, prompt["prompt"], where, options=options, add_generation_prompt=True)["input_ids"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's own; where it is the run's, and for an endpoint, that with the template that the recipe gives it."""
        run = self.models.tokenizer
        if self.spec.model.url is not None or not self.is_possible:
            return run
        own = load_tokenizer_of(tokenizer_spec(self.models.placed(self.spec.model)))
        return own if differences(run, own) else run

    @cached_property
    def _base(self) -> ModelSpec:
        """The model that carries the weights, where it lies."""
        return base_spec(self.models.placed(self.spec.model))

    @property
    def _endpoint(self) -> JudgeSpec:
        """How a model that is served is asked."""
        model = self.spec.model
        where = {"model": model.served_model, "base_url": model.url, "api_key_env": model.api_key_env}
        return JudgeSpec(**where, concurrency=self.spec.concurrency)

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, a user turn that the model writes included.

        Raises:
            UserError: prompts that cannot be read or rendered, a template without a user's turn to open.
        """
        spec = self.spec.prompts
        if spec.written == "bos":
            return len(self._start())
        if spec.written == "self":
            UserTurn.of(self.tokenizer, f"{self.where}.prompts")
            return len(self.encode({"prompt": [{"role": "user", "content": "-"}]})) + spec.max_new_tokens
        if any(isinstance(prompt["prompt"], list) for prompt in self.prompts) and self.tokenizer.chat_template is None:
            raise UserError(f"{self.where}: its prompts are messages, and the tokenizer of its model has no chat template")
        return max(len(self.encode(prompt)) for prompt in self.prompts)

    def _start(self) -> list[int]:
        """The token that a text begins with."""
        tokenizer = self.tokenizer
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if first is None:
            raise UserError(f"{self.where}.prompts: bos: the tokenizer has neither a BOS nor an EOS token to begin with")
        return [first]

    @contextmanager
    def _author(self) -> Iterator[Author]:
        spec = self.spec
        if spec.model.url is not None:
            with ChatClient(self._endpoint, self._home / "replies", role=self.where, allowed=self.models.allowed) as client:
                yield EndpointAuthor(client, self.tokenizer, spec)
            return
        placed = self.models.placed(spec.model)
        unset_hf_deepspeed_config()  # a stage's config has set it, and the model would be split over the ranks
        model = load_model(placed) if placed.adapter is None else load_continued(placed)
        if not placed.quantization and placed.device_map is None:
            model = model.to(self.models.device)  # type: ignore[arg-type]
        turn = UserTurn.of(self.tokenizer, f"{self.where}.prompts") if spec.prompts.written == "self" else None
        start = self._start() if spec.prompts.written == "bos" else []
        yield LocalAuthor(model, self.tokenizer, spec, self.encode, turn, start)

    @cached_property
    def _facts(self) -> dict[str, Any]:
        """What decides its attempts: the spec, the contents of the model, its tokenizer, the prompts."""
        model = self.spec.model
        facts: dict[str, Any] = {"spec": generated_key(self.models.recipe, self.name)}
        if model.url is None:
            facts["model"] = contents(self.models, model)
            facts["spec"].pop("model")  # what it is counts, not where it lies
        facts["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        if self.spec.prompts.written is None:
            facts["prompts"] = facts_hash(self.prompts)
        return facts

    @cached_property
    def _home(self) -> Path:
        return self.models.folder.generated(self.name, self._facts)


def generated_sources(models: ModelBuilder) -> dict[str, GeneratedSource]:
    """The generated sources of a recipe."""
    names = [name for name, source in models.recipe.sources.items() if source.generated is not None]
    return {name: GeneratedSource(models, name) for name in names}


def prompt_facts(recipe: Recipe) -> Callable[[str], tuple[int | None, int]]:
    """A function that gives the number of prompts of a generated source and the tokens of the longest."""

    def facts(name: str) -> tuple[int | None, int]:
        source = GeneratedSource(ModelBuilder(DataBuilder(recipe)), name)
        return None if source.spec.prompts.written is not None else len(source.prompts), source.longest_prompt()

    return facts


def find_sources(models: ModelBuilder) -> None:
    """Make the generated sources that are written known to the rows of a run."""
    for source in generated_sources(models).values():
        source.find()
