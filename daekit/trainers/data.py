"""Rows for a trainer: TRL's preparation with the domain kept, a length policy that counts, and loss on the response only."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets
from transformers import PreTrainedTokenizerBase

from daekit.data.columns import first_row, require_domains, require_values
from daekit.data.preparation import DomainCount, fit_stream_to_length, fit_to_length
from daekit.data.responses import ResponseLabels, label_responses
from daekit.data.teacher_prompts import TEACHER_PROMPT, pack_with_prompts, require_followed, teacher_row, with_teacher_prompts
from daekit.errors import UserError
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.models.vocabulary import vocabulary_size
from daekit.trainers.config import KDConfig, cuts_rows, written_tokens
from daekit.trainers.validation import refuse_shared_stream

logger = logging.getLogger(__name__)


class RowPreparation:
    """Prepares the data sets of one trainer; ``counts`` says what became of their rows, by data set and domain (no streams).

    Args:
        default_domain: domain of the rows of a data set that has no column ``domain``; None: it must have one.
        domains: the domains that a packed stream may hold, for they cannot be listed without reading it.
        columns: ids that every model of the run knows.
    """

    def __init__(self, default_domain: str | None, domains: Sequence[str], columns: int) -> None:
        self.default_domain, self.domains, self.columns = default_domain, list(domains), columns
        self.counts: dict[str, dict[str, DomainCount]] = {}

    def prepare(
        self,
        trl: Callable[..., Any],
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: Any,
        packing: bool,
        formatting_func: Callable[[dict[str, Any]], str] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """TRL's preparation in two steps, tokenise then pack, with the length policy between and the domain kept.

        ``trl`` is ``SFTTrainer._prepare_dataset``, whose arguments follow.

        Raises:
            UserError: rows without a domain or with None in a column, overlong rows, messages whose response cannot be told.
        """
        tokenizer, name = processing_class, dataset_name
        if isinstance(dataset, IterableDataset) and name != "train":
            refuse_shared_stream(args, name)
        dataset = require_domains(dataset, name, self.default_domain)
        if "seq_lengths" in (dataset.column_names or ()):
            return dataset  # prepared and packed before: `evaluate` was given one of our own data sets

        def tokenise(rows: Any, name: str) -> Any:
            if formatting_func is None:
                rows = require_values(rows, name, args.dataset_text_field)
                if args.assistant_only_loss is None:
                    rows = self._label_responses(rows, tokenizer, args.dataset_num_proc, name)
            return self._tokenised(trl, rows, tokenizer, args, formatting_func, name)

        dataset = _with_teacher_prompts(tokenise, dataset, tokenizer, args, packing, name)
        limit = None if cuts_rows(args, packing) else args.max_length
        if isinstance(dataset, IterableDataset):
            dataset = fit_stream_to_length(dataset, limit, args.overlong, name)
        else:
            teacher_limit = args.teacher_max_length if isinstance(args, KDConfig) else None
            written = written_tokens(args) if name == "train" else 0
            dataset, self.counts[name] = fit_to_length(dataset, limit, args.overlong, name, teacher_limit, written, tokenizer)
            self._log_counts(name)
        if packing:
            return self._pack_by_domain(trl, dataset, tokenizer, args, name)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _tokenised(self, trl: Callable[..., Any], dataset: Any, tokenizer: Any, args: Any, formatting: Any, name: str) -> Any:
        whole, tokenised_before = copy.copy(args), "input_ids" in first_row(dataset, name)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = trl(dataset, tokenizer, whole, False, formatting, name)
        size = vocabulary_size(tokenizer)
        if self.columns >= size and not tokenised_before:
            return dataset  # the tokenizer writes no other tokens
        known = functools.partial(self._require_known_ids, size=size, tokenizer=tokenizer, name=name)
        if isinstance(dataset, IterableDataset):
            return dataset.map(known, with_indices=True)
        for table in dataset.select_columns("input_ids").with_format("arrow").iter(batch_size=1000):
            ends = pc.min_max(pc.list_flatten(table["input_ids"])).as_py()
            if ends["min"] is not None and not 0 <= ends["min"] <= ends["max"] < min(self.columns, size):
                for at, row in enumerate(dataset):  # says which row it is
                    known(row, at)
        return dataset

    def _require_known_ids(self, row: dict[str, Any], at: int, size: int, tokenizer: Any, name: str) -> dict[str, Any]:
        """Pass a row on whose tokens all models know; ``size``: ids of the tokenizer."""
        unknown = next((token for token in row["input_ids"] if not 0 <= token < min(self.columns, size)), None)
        if unknown is None:
            return row
        if not 0 <= unknown < size:
            raise UserError(
                f"the {name} data set, row {at}: input_ids holds {unknown}, and the tokenizer's ids end at {size - 1}. Was the "
                "row tokenised by another one? A token of your own must be added to the tokenizer."
            )
        raise UserError(
            f"the {name} data set, row {at}: token {tokenizer.convert_ids_to_tokens(unknown)!r} (id {unknown}) was added to "
            f"the tokenizer, but a model of this run has only {self.columns} rows in its embeddings or output head. Leave the "
            "token out of the row, or resize the model's embeddings."
        )

    def _label_responses(self, dataset: Any, tokenizer: PreTrainedTokenizerBase, processes: int | None, name: str) -> Any:
        """``messages`` rows with their ids and labels; rows of other forms as they are."""
        row = first_row(dataset, name)
        if "input_ids" in row or {"prompt", "completion"} <= row.keys() or not {"messages", "conversations"} & row.keys():
            return dataset
        labels = ResponseLabels.of(tokenizer)
        logger.warning("%s: loss on the response only: %s", name, labels.description)
        return label_responses(dataset, tokenizer, labels, name, processes)

    def _pack_by_domain(
        self, trl: Callable[..., Any], dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, name: str
    ) -> Any:
        """Pack the rows of each domain by TRL's packing, so that a block has one domain."""
        streaming = isinstance(dataset, IterableDataset)
        domains = self.domains if streaming else list(dict.fromkeys(dataset["domain"]))
        if streaming:
            dataset = dataset.map(self._require_known_domain)

        told = TEACHER_PROMPT_IDS in (dataset.column_names or ())
        packed = []
        for domain in domains:
            part = dataset.filter(lambda row, domain=domain: row["domain"] == domain)
            how = {"packing": True, "formatting_func": None, "dataset_name": f"{name} ({domain})"}
            pack = functools.partial(trl, processing_class=tokenizer, args=args, **how)
            part = pack_with_prompts(pack, part) if told else pack(part)
            packed.append(part.map(lambda row, domain=domain: {"domain": domain}))
        if streaming:
            return interleave_datasets(packed, stopping_strategy="all_exhausted_without_replacement")
        together = concatenate_datasets(packed)
        return together.shuffle(seed=args.seed) if args.shuffle_dataset else together

    def _require_known_domain(self, row: dict[str, Any]) -> dict[str, Any]:
        """Pass a row of a stream on, for packing by domain would leave out the rows of a domain that is not listed."""
        if row["domain"] not in self.domains:
            raise UserError(
                f"a packed stream has a row of domain {row['domain']!r} but may hold only {', '.join(self.domains)}: "
                "domains are packed apart, and a stream does not list its own. Use packing=False or a map-style Dataset."
            )
        return row

    def _log_counts(self, name: str) -> None:
        for domain, count in self.counts[name].items():
            lost = {what: n for what in ("truncated", "dropped", "crowded", "emptied", "blank") if (n := getattr(count, what))}
            level = logging.WARNING if lost else logging.INFO
            logger.log(level, "%s, %s: %d rows, %d loss tokens %s", name, domain, count.rows, count.loss_tokens, lost or "")


def _with_teacher_prompts(
    tokenise: Callable[[Any, str], Any], dataset: Any, tokenizer: PreTrainedTokenizerBase, args: Any, packing: bool, name: str
) -> Any:
    """Tokenised rows, with the tokens of their ``teacher_prompt`` where a teacher is to see it.

    Raises:
        UserError: rows that cannot be followed, a stream, packing that splits rows, losses that other tokens do not serve.
    """
    columns = dataset.column_names or first_row(dataset, name).keys()
    if not isinstance(args, KDConfig) or not {TEACHER_PROMPT, TEACHER_PROMPT_IDS} & set(columns):
        return tokenise(dataset, name)  # labels alone: nobody is told more
    require_followed(args.objective(), cuts_rows(args, packing))
    if isinstance(dataset, IterableDataset):
        raise UserError(
            f"the {name} data set is a stream with teacher_prompt, whose rows cannot be compared before the first step. Give a "
            "map-style Dataset (datasets.Dataset.from_list(list(stream)))."
        )
    if TEACHER_PROMPT_IDS in columns:
        return tokenise(dataset, name)
    if "input_ids" in columns:
        raise UserError(
            f"the {name} data set has input_ids and a teacher_prompt that is not tokenised: give teacher_prompt_ids instead, "
            "the tokens that the teacher sees in place of those before the response (an empty list: the same)"
        )
    seen = dataset.map(
        lambda row, at: teacher_row(row, f"the {name} data set, row {at}"), with_indices=True, remove_columns=TEACHER_PROMPT
    )
    given = [prompt is not None for prompt in dataset[TEACHER_PROMPT]]
    own = tokenise(dataset.remove_columns(TEACHER_PROMPT), name)
    return with_teacher_prompts(own, tokenise(seen, f"{name} (teacher_prompt)"), given, tokenizer, name)
