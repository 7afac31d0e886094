"""What a run will train on, shown before it begins: first rows as the model will see them, lengths, shares of tokens."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from daekit.data.preparation import DomainCount
from daekit.data.rows import form_of
from daekit.models.teacher_view import TEACHER_PROMPT_IDS, as_teacher_sees, is_told_more
from daekit.runtime.columns import printable
from daekit.runtime.data import LossRule
from daekit.runtime.prepare import Prepared
from daekit.runtime.stage_rows import PreparedStage

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_MARKS = ("{+", "+}")  # as `git diff --word-diff` marks what is new
_LONGEST_TEXT = 600  # characters of a stretch that are shown


def preview(prepared: Prepared, rows: int = 2, colour: bool | None = None) -> str:
    """Sources and stages of a prepared recipe for a reader.

    Args:
        rows: first training rows to show of each source.
        colour: show what carries loss in green instead of between ``{+`` and ``+}``; default: on a terminal, unless
            ``NO_COLOR`` is set.
    """
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") if colour is None else colour
    if not prepared.stages and not prepared.waiting:
        return "every stage is complete: nothing will be trained"
    uses: dict[tuple[str, LossRule], bool] = {}  # whether a teacher sees the rows
    stages = prepared.models.recipe.stages
    for stage in (stages[name] for name in prepared.stages):
        for source in stage.data.sources:
            use = source, LossRule.of(stage)
            uses[use] = uses.get(use, False) or stage.type != "sft"
    marked = "green" if colour else f"{_MARKS[0]}so{_MARKS[1]}"
    lines = [f"What carries loss is {marked}."]
    for (source, rule), told in uses.items():
        lines += ["", *_source(prepared, source, rule, told, rows, colour)]
    for name in prepared.stages:
        lines += ["", f"[{name}] {stages[name].type}", *stage_lines(prepared, name)]
    for name, waits in prepared.waiting.items():
        lines += ["", f"[{name}] {stages[name].type}: its rows of {', '.join(waits)} are still to be written"]
    return "\n".join([*lines, *(f"note: {note}" for note in prepared.notes)])


def stage_lines(prepared: Prepared, name: str) -> list[str]:
    """What a stage trains on, line by line: its sources with what carries loss, then rows and loss tokens of each domain."""
    data, ready, lines = prepared.models.data, prepared.stages[name], []
    rule = LossRule.of(data.recipe.stages[name])
    for use in ready.mixture.table:
        carries = rule.describe(form_of(data.source(use.source)[0]), data.tokenizer)
        lines.append(
            f"    {use.source} ({use.domain}): {use.used:,} of {use.available:,} rows, {use.share:.0%} of the mixture, each "
            f"{use.repeats:.3g} times; loss on {carries}"
        )
    lines.extend(_counted(ready, "", ready.counts))
    objective = ready.arguments.objective()
    if objective.on_policy:
        lines.append(
            f"    on-policy: the student writes the responses of {objective.on_policy:.0%} of the rows, at most "
            f"{objective.max_new_tokens} tokens each, for {objective.rollout_buffer} steps at a time (by the student of up to "
            f"{objective.rollout_buffer - 1} steps ago)"
        )
    return [*lines, *_counted(ready, "validation, ", ready.validation_counts)]


def _counted(ready: PreparedStage, what: str, counts: Mapping[str, DomainCount]) -> Iterator[str]:
    by_rows = ready.arguments.objective().normalize == "rows"
    weights = {domain: count.rows if by_rows else count.loss_tokens for domain, count in counts.items()}
    unit, total = "the rows, which count alike" if by_rows else "them", sum(weights.values())
    limit = ready.arguments.max_length
    fates = {
        "truncated": f"cut at max_length={limit}",
        "dropped": f"left out, longer than max_length={limit}",
        "crowded": f"left out, no room for max_new_tokens={ready.arguments.objective().max_new_tokens} behind the prompt",
        "emptied": f"left out, no loss token within max_length={limit}",
        "blank": "left out, nothing to predict",
    }
    for domain, count in counts.items():
        lost = [f"{getattr(count, fate):,} {words}" for fate, words in fates.items() if getattr(count, fate)]
        share = f"{weights[domain] / total:.0%} of {unit}" if total else "none"
        yield "; ".join([f"    {what}{domain}: {count.rows:,} rows, {count.loss_tokens:,} loss tokens ({share})", *lost])


def _source(prepared: Prepared, source: str, rule: LossRule, told: bool, rows: int, colour: bool) -> Iterator[str]:
    data = prepared.models.data
    tokens, form = data.tokenized(source, rule, told)[0], form_of(data.source(source)[0])
    lengths = np.array([len(ids) for ids in tokens["input_ids"]])
    yield (
        f"{source} ({data.recipe.sources[source].domain}): {len(tokens):,} training rows of {form}; tokens "
        f"{lengths.min():,} / {int(np.median(lengths)):,} / {lengths.max():,} (least / median / most); loss on "
        f"{rule.describe(form, data.tokenizer)}"
    )
    if TEACHER_PROMPT_IDS in tokens.column_names:
        seen = [len(as_teacher_sees(row)["input_ids"]) for row in tokens if is_told_more(row)]
        yield (
            f"    teachers see {len(seen):,} rows with a teacher_prompt instead of the prompt; tokens {min(seen):,} / "
            f"{int(np.median(seen)):,} / {max(seen):,}"
        )
    for name, ready in prepared.stages.items():
        limit = ready.arguments.max_length
        if source in data.recipe.stages[name].data.sources and limit is not None and lengths.max() > limit:
            yield f"    {int((lengths > limit).sum()):,} rows are longer than stages.{name}.trainer.max_length={limit}"
    for number in range(min(rows, len(tokens))):
        yield f"--- row {number + 1} of {source} ({lengths[number]} tokens)"
        yield _shown(tokens[number], data.tokenizer, colour)
        if is_told_more(tokens[number]):
            row = as_teacher_sees(tokens[number])
            yield f"--- row {number + 1} of {source} as its teacher sees it ({len(row['input_ids'])} tokens)"
            yield _shown(row, data.tokenizer, colour)


def _shown(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, colour: bool) -> str:
    before, after = (_GREEN, _PLAIN) if colour else _MARKS
    return "".join(f"{before}{text}{after}" if loss else text for text, loss in _pieces(row, tokenizer))


def _pieces(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool]]:
    """(text, whether it carries loss) of the stretches of a tokenised row; its first token is predicted by nothing."""
    labelled = zip(row["input_ids"], row["labels"], range(len(row["labels"])), strict=True)
    ids: list[int] = []
    done = ""
    for loss, group in groupby(labelled, key=lambda each: each[2] > 0 and each[1] >= 0):
        stretch = [token for token, _, _ in group]
        ids += stretch
        text: str = tokenizer.decode(ids)
        # decoded as a part of the whole, for a stretch alone would lose the space before it
        part = text.removeprefix(done) if text.startswith(done) else tokenizer.decode(stretch)
        done = text
        yield _short(printable(part)), loss


def _short(text: str) -> str:
    if len(text) <= _LONGEST_TEXT:
        return text
    half = _LONGEST_TEXT // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
