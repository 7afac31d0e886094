"""The rows of a recipe: each source is read once, tokenised once for each way of labelling it, then mixed for each stage."""

from __future__ import annotations

import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.table import InMemoryTable
from transformers import PreTrainedTokenizerBase

from daekit.data.mixture import Mixture, mix
from daekit.data.responses import ResponseLabels
from daekit.data.rows import UNFINISHED, form_of
from daekit.data.sources import load_source
from daekit.data.teacher_prompts import PROMPT_IDS_TYPE, TEACHER_PROMPT
from daekit.data.tokenize import TokenizedRow, tokenize_each
from daekit.data.tokenizer import load_tokenizer, source_texts, train_tokenizer
from daekit.errors import UserError
from daekit.evaluation import EvaluationSet, tokenize_rows
from daekit.models.adapters import base_spec
from daekit.models.loading import load_tokenizer_of
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.recipe.schema import Recipe, StageSpec
from daekit.runtime.folders import RunFolder, read_file

_TRAINED_ON = "trained_on.json"
_TOKENS = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32")), "domain": Value("large_string")})


@dataclass(frozen=True)
class LossRule:
    """Which tokens of a row carry loss, by the options of TRL that a stage sets.

    Attributes:
        assistant_only: whether in conversations only what the assistant writes carries loss; None: of messages the response
            does (``daekit.data.responses``).
        completion_only: whether of prompt and completion only the completion carries loss; False: all of both does, or, with
            ``assistant_only``, all that the assistant writes.
    """

    assistant_only: bool | None = None
    completion_only: bool = True

    @classmethod
    def of(cls, stage: StageSpec) -> LossRule:
        """The rule of a stage."""
        return cls(stage.trainer.get("assistant_only_loss"), stage.trainer.get("completion_only_loss") is not False)

    def describe(self, form: str, tokenizer: PreTrainedTokenizerBase) -> str:
        """What carries loss in rows of a form, in words."""
        if form == "messages" and self.assistant_only is None:
            return ResponseLabels.of(tokenizer).description
        if form == "messages" or (form == "conversation pair" and not self.completion_only):
            return "what the assistant writes" if self.assistant_only else "every token, the user's and the system's too"
        if form == "text" or not self.completion_only:
            return "every token"
        return "the completion" + (", of it what the assistant writes" if self.assistant_only else "")


class DataBuilder:
    """The sources of one run, read and tokenised when they are first needed. It writes nothing but ``save_tokenizer``.

    A row is tokenised in the form that its source has, so that sources of different forms can be mixed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.folder = recipe, RunFolder(recipe.output_dir)
        self.written: dict[str, Path] = {}  # generated sources that are complete -> their rows
        self._read: dict[str, tuple[Dataset, Dataset | None]] = {}
        self._tokenized: dict[tuple[str, LossRule, bool], tuple[Dataset, Dataset | None]] = {}

    def source(self, name: str) -> tuple[Dataset, Dataset | None]:
        """(training rows, validation rows or None) of a source, as text."""
        if name not in self._read:
            spec = self.recipe.sources[name]
            if self.is_unwritten(name):
                raise UserError(f"sources.{name}: its rows are not written yet; `daekit generate RECIPE` writes them")
            if spec.generated is not None:
                columns = {UNFINISHED: UNFINISHED}  # other sources may have a column of that name that says something else
                spec = spec.model_copy(update={"path": str(self.written[name]), "generated": None, "columns": columns})
            rows = load_source(name, spec, self.recipe.seed)
            self._read[name] = rows if self._is_followed(name) else _without(TEACHER_PROMPT, rows)
        return self._read[name]

    def is_unwritten(self, name: str) -> bool:
        """Whether a model has still to write the rows of a source."""
        return self.recipe.sources[name].generated is not None and name not in self.written

    def _is_followed(self, name: str) -> bool:
        """Whether a teacher sees the rows of a source, or those that are written to its prompts."""
        written = {other: spec.generated for other, spec in self.recipe.sources.items() if spec.generated is not None}
        names = {name, *(other for other, spec in written.items() if spec.prompts.source == name)}
        return any(stage.type != "sft" and names & {*stage.data.sources} for stage in self.recipe.stages.values())

    def tokenized(self, name: str, rule: LossRule, told: bool = True) -> tuple[Dataset, Dataset | None]:
        """The same as ``input_ids`` and ``labels`` (-100 where a token carries no loss) with their ``domain``.

        Args:
            name: name of the source.
            rule: which tokens carry loss.
            told: whether a teacher sees them; without one a ``teacher_prompt`` is not looked at.

        Raises:
            UserError: a row that cannot be tokenised, or that the chat template refuses.
        """
        training, validation = self.source(name)
        told = told and TEACHER_PROMPT in training.column_names
        key = name, rule, told
        if key not in self._tokenized:
            if not told:
                training, validation = _without(TEACHER_PROMPT, (training, validation))
            tokens = self._tokens(training, f"sources.{name}: training row", rule)
            watched = None if validation is None else self._tokens(validation, f"sources.{name}: validation row", rule)
            self._tokenized[key] = tokens, watched
        return self._tokenized[key]

    def mixture(self, stage: StageSpec) -> Mixture:
        """The training rows of a stage, tokenised."""
        return mix({name: self.for_stage(name, stage)[0] for name in stage.data.sources}, stage.data, self.recipe.seed)

    def validation(self, stage: StageSpec) -> Dataset | None:
        """The validation rows of the sources of a stage, one after another, tokenised."""
        parts = [rows for name in stage.data.sources if (rows := self.for_stage(name, stage)[1]) is not None]
        return concatenate_datasets(parts) if parts else None

    def for_stage(self, name: str, stage: StageSpec) -> tuple[Dataset, Dataset | None]:
        """Tokenised rows of a source, as a stage trains on them."""
        return self.tokenized(name, LossRule.of(stage), stage.type != "sft")

    @cached_property
    def evaluation_sets(self) -> dict[str, EvaluationSet]:
        """The tokenised validation rows of the report's sources: scored are the tokens that the stages train on."""
        spec = self.recipe.evaluation
        assert spec is not None
        scored = partial(tokenize_rows, limit=spec.limit, assistant_only_loss=self.report_rule.assistant_only)
        sets = {}
        for name in spec.sources:
            if (rows := self.source(name)[1]) is not None:
                sets[name] = scored(rows, self.tokenizer, source=name, domain=self.recipe.sources[name].domain)
        return sets

    @property
    def report_rule(self) -> LossRule:
        """The rule by which the report scores: that of the stages; where they differ, the default."""
        rules = [LossRule.of(stage) for stage in self.recipe.stages.values()]
        return rules[0] if len(set(rules)) == 1 else LossRule()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the run: the recipe's own (trained once, then read from the run's folder), or the first student's.

        Raises:
            UserError: it cannot be loaded or trained.
        """
        spec = self.recipe.tokenizer
        if spec is None:
            first = next(iter(self.recipe.stages.values())).student
            first = first.init.from_ if first and first.init else first
            assert first is not None, "checked when the recipe was loaded"
            return load_tokenizer_of(base_spec(first))
        if spec.train is None:
            return load_tokenizer(spec)
        home = self.folder.tokenizer
        if home.is_dir() and self._tokenizer_is_ours():
            return load_tokenizer(spec.model_copy(update={"train": None, "path": str(home)}))
        texts = (text for name in spec.train.sources for text in source_texts(self.source(name)[0]))
        with tempfile.TemporaryDirectory() as made:  # read back, so that it is the one that later commands find
            train_tokenizer(texts, spec.train).save_pretrained(made)
            tokenizer = load_tokenizer(spec.model_copy(update={"train": None, "path": made}))
        tokenizer.name_or_path = str(home)
        return tokenizer

    def save_tokenizer(self) -> None:
        """Keep a tokenizer that was trained on the rows in the run's folder, for one process."""
        spec, home = self.recipe.tokenizer, self.folder.tokenizer
        if spec is None or spec.train is None or (home.is_dir() and self._tokenizer_is_ours()):
            return
        shutil.rmtree(home, ignore_errors=True)
        half = home.with_suffix(".half")
        self.tokenizer.save_pretrained(half)
        (half / _TRAINED_ON).write_text(json.dumps(self._tokenizer_facts()))
        half.rename(home)

    def _tokenizer_is_ours(self) -> bool:
        """Whether the tokenizer in the run's folder was trained with these settings; else it is of a run that never began."""
        home = self.folder.tokenizer
        same = not (home / _TRAINED_ON).is_file() or read_file(home / _TRAINED_ON, delete=home) == self._tokenizer_facts()
        if not same and self.folder.is_begun:
            raise UserError(
                f"{home}: was trained with other settings or sources. Delete it and the stages that use it, "
                "or choose another output_dir."
            )
        return same

    def _tokenizer_facts(self) -> dict[str, Any]:
        spec = self.recipe.tokenizer
        assert spec is not None and spec.train is not None
        facts: dict[str, Any] = {}
        for name in spec.train.sources:  # the part of each that decides its training rows
            source = self.recipe.sources[name].model_dump(mode="json")
            facts[name] = {key: value for key, value in source.items() if not key.startswith("validation")}
        return facts | {"train": spec.train.model_dump(mode="json")}

    def _tokens(self, rows: Dataset, where: str, rule: LossRule) -> Dataset:
        form = form_of(rows)
        require_an_assistant(where.rsplit(": ")[0], form, rule)
        needed = rows.select_columns([column for column in rows.column_names if column not in ("answer", "domain")])
        whole = not rule.completion_only and form != "messages"
        texts: Iterable[Mapping[str, Any]] = map(_joined, needed) if whole else needed
        assistant_only = rule.assistant_only if form == "messages" else bool(rule.assistant_only)
        tokenized = tokenize_each(texts, self.tokenizer, where, assistant_only, prompts=False)
        return as_dataset(tokenized, rows[0]["domain"])


def require_an_assistant(where: str, form: str, rule: LossRule) -> None:
    """UserError for rows of a form in which nobody is marked as the assistant, where only what that says carries loss."""
    if rule.assistant_only and form in ("text", "prompt+completion"):
        raise UserError(
            f"{where}: its rows are {form}, in which nobody is marked as the assistant, but a stage sets "
            "assistant_only_loss. Leave it out, or give conversations (`chat: true` makes them of prompt and completion)."
        )


def stage_rows(recipe: Recipe) -> Callable[[StageSpec], tuple[Dataset, Dataset | None]]:
    """A function that gives the tokenised rows of a stage for training and for validation; nothing is read before."""
    data = DataBuilder(recipe)
    return lambda stage: (data.mixture(stage).dataset, data.validation(stage))


def as_dataset(rows: Iterable[TokenizedRow], domain: str) -> Dataset:
    """Tokenised rows as a table in memory, without Python's lists of all of them at a time."""
    ids, labels, offsets = array("i"), array("i"), array("i", [0])
    prompts, ends, told = array("i"), array("i", [0]), False
    for row in rows:
        ids.extend(row.input_ids)
        labels.extend(row.labels)
        offsets.append(len(ids))
        told = told or row.teacher_prompt_ids is not None
        prompts.extend(row.teacher_prompt_ids or ())
        ends.append(len(prompts))
    domains, features = pa.array([domain] * (len(offsets) - 1), pa.large_string()), _TOKENS
    columns = [_lists(ids, offsets), _lists(labels, offsets), domains]
    if told:
        columns.append(_lists(prompts, ends))
        features = Features({**_TOKENS, TEACHER_PROMPT_IDS: PROMPT_IDS_TYPE})
    return Dataset(InMemoryTable(pa.Table.from_arrays(columns, schema=features.arrow_schema)))


def _lists(values: array[int], offsets: array[int]) -> pa.Array:
    flat = pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat)


def _without(column: str, parts: tuple[Dataset, Dataset | None]) -> Any:
    """Rows for training and validation without a column that they may have."""
    return tuple(rows.remove_columns(column) if rows is not None and column in rows.column_names else rows for rows in parts)


def _joined(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of which everything carries loss: a text, or a conversation, as TRL joins prompt and completion."""
    if "text" in row:
        return dict(row)
    rest = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
    together = row["prompt"] + row["completion"]
    return rest | ({"text": together} if isinstance(together, str) else {"messages": together})
