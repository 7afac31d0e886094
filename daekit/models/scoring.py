"""What a model thinks of given rows: sums per row of NLL, right guesses and KL to a teacher, without [B,T,V] logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from daekit.errors import UserError
from daekit.models.backbone import backbone_of, base_of, frozen_forward
from daekit.models.heads import common_columns, head_logits, output_head, teacher_log_probs
from daekit.models.teacher_view import as_teacher_sees, is_told_more
from daekit.protocol import IGNORE_INDEX, Batch, Member, OutputHead, Teacher, TeacherOutput

TokenRow = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class RowScores:
    """Sums over the loss tokens of each of R rows, in the order of the rows."""

    tokens_R: np.ndarray  # int64, loss tokens
    nll_R: np.ndarray  # float64, negative log-likelihood in nats
    correct_R: np.ndarray  # int64, tokens that are the first choice (the lowest id of equal ones, as greedy decoding takes)
    kl_R: np.ndarray | None  # float64, KL(teacher || model) in nats at temperature 1; None without a teacher


def score_rows(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    *,
    vocab_size: int,
    batch_size: int = 32,
    teacher: PreTrainedModel | Teacher | None = None,
    domain: str = "",
    chunk_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> RowScores:
    """Score tokenised rows under ``model``, and compare it with ``teacher`` on the same positions.

    Columns at and beyond ``vocab_size`` are left out of both softmaxes. Rows are batched by length with right padding.
    Runs in eval mode without gradient; the mode of every module is restored.

    Memory: the hidden states of one batch and ``chunk_size x V`` float32 logits of the model and of each
        member of the teacher.

    Args:
        model: a causal language model, or a PEFT model around one (with the adapter that is active).
        rows: ``input_ids`` and ``labels`` (-100 where a token does not count) of equal length per row; ``teacher_prompt_ids``
            where the teacher sees other tokens before the response (``daekit.models.teacher_view``).
        domain: the domain of the rows, for a teacher that chooses by it.
        progress: called with (rows scored, all of them), now and then.

    Raises:
        UserError: for a prompt-learning adapter, whose virtual tokens a call of the backbone would miss, for a teacher that
            gives sparse distributions, and for what ``output_head`` refuses.
    """
    sums_R3 = torch.zeros(len(rows), 3, dtype=torch.float64)
    tokens_R = torch.zeros(len(rows), dtype=torch.int64)
    for row_N, scores_N3 in _scores(model, rows, vocab_size, batch_size, teacher, domain, chunk_size):
        tokens_R.index_add_(0, row_N, torch.ones_like(row_N))
        sums_R3.index_add_(0, row_N, scores_N3)
        if progress is not None:
            progress(int((tokens_R > 0).sum()), len(rows))
    nll_R, correct_R, kl_R = sums_R3.numpy().T.copy()
    return RowScores(tokens_R.numpy(), nll_R, correct_R.astype(np.int64), None if teacher is None else kl_R)


def score_tokens(
    model: PreTrainedModel, rows: Sequence[TokenRow], *, vocab_size: int, batch_size: int = 32, chunk_size: int = 256
) -> list[np.ndarray]:
    """The float64 NLL in nats of every loss token of each row, in the order of the tokens; otherwise as ``score_rows``."""
    rows_of_tokens, values = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.float64)]
    for row_N, scores_N3 in _scores(model, rows, vocab_size, batch_size, None, "", chunk_size):
        rows_of_tokens.append(row_N)
        values.append(scores_N3[:, 0])
    row_N = torch.cat(rows_of_tokens)
    order = row_N.argsort(stable=True)  # the tokens of a row come in their order
    counts = torch.bincount(row_N, minlength=len(rows)).tolist()
    return [part.numpy() for part in torch.cat(values)[order].split(counts)]


def _scores(
    model: Any, rows: Sequence[TokenRow], vocab_size: int, batch_size: int, teacher: Any, domain: str, chunk_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """``[N]`` the row of each loss token and ``[N, 3]`` float64 scores (see ``_score_chunk``), chunk by chunk, on the CPU."""
    _refuse_prompt_learning(model)
    head = output_head(model, vocab_size)
    for indices, batch in batches(rows, batch_size, domain, base_of(model).device):
        with frozen_forward(model):
            row_N = torch.tensor(indices)[batch.row_N.cpu()]
            hidden_NH = _hidden(model, batch)
            outputs = [] if teacher is None else _outputs(teacher, batch, vocab_size)
            head, outputs = common_columns(head, outputs)
            chunks = zip(hidden_NH.split(chunk_size), batch.labels_N.split(chunk_size), strict=True)
            scores = [_score_chunk(h, head, labels, outputs, n * chunk_size) for n, (h, labels) in enumerate(chunks) if len(h)]
        if scores:
            yield row_N, torch.cat(scores).double().cpu()


def _score_chunk(hidden_NH: Tensor, head: OutputHead, labels_N: Tensor, outputs: Sequence[TeacherOutput], start: int) -> Tensor:
    """``[N, 3]``: NLL, 1 where the label is the first choice, and KL (0 without a teacher) of positions ``start...``."""
    logits_NV = head_logits(hidden_NH, head)
    labels_N = labels_N.to(logits_NV.device)
    log_p_NV = logits_NV.log_softmax(dim=-1)
    nll_N = -log_p_NV.gather(1, labels_N[:, None])[:, 0]
    correct_N = logits_NV.argmax(dim=-1) == labels_N
    kl_N = torch.zeros_like(nll_N)
    for output in outputs:
        positions_M = output.positions_M.to(nll_N.device)
        inside_M = (positions_M >= start) & (positions_M < start + len(nll_N))
        if not inside_M.any():
            continue
        local = positions_M[inside_M] - start
        log_t_MV = teacher_log_probs(output, inside_M.nonzero().flatten()).to(log_p_NV.device)
        kl_N[local] = (log_t_MV.exp() * (log_t_MV - log_p_NV[local])).sum(dim=-1)
    return torch.stack([nll_N, correct_N.to(nll_N.dtype), kl_N], dim=-1)


def _outputs(teacher: PreTrainedModel | Teacher, batch: Batch, vocab_size: int) -> list[TeacherOutput]:
    batch = batch.for_teacher or batch
    if isinstance(teacher, Teacher):
        outputs = teacher.outputs(batch)
        if any(output.top_k is not None for output in outputs):
            raise UserError(
                "the KL to a teacher is of whole distributions, but this teacher gives only its most likely tokens (top_k), "
                "whose KL is smaller: compare with the model that they come from"
            )
        return outputs
    _refuse_prompt_learning(teacher)
    with frozen_forward(teacher):
        member = Member(_hidden(teacher, batch), output_head(teacher, vocab_size))
    return [TeacherOutput(torch.arange(len(batch.labels_N), device=member.hidden_MH.device), (member,))]


def _hidden(model: PreTrainedModel, batch: Batch) -> Tensor:
    """``[N, H]`` last hidden states at the loss positions."""
    base = base_of(model)
    inputs = {key: value.to(base.device) for key, value in batch.inputs.items()}
    return batch.at_loss_positions(backbone_of(base)(**inputs, use_cache=False).last_hidden_state)


def batches(rows: Sequence[TokenRow], batch_size: int, domain: str, device: torch.device) -> Iterator[tuple[list[int], Batch]]:
    """Batches of rows of like length, with their indices; the longest first: what does not fit in memory fails at once."""
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]["input_ids"]), reverse=True)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        yield indices, _collate([rows[index] for index in indices], domain, device)


def _collate(rows: Sequence[TokenRow], domain: str, device: torch.device) -> Batch:
    ids, labels = ([torch.tensor(row[name], dtype=torch.long) for row in rows] for name in ("input_ids", "labels"))
    input_ids_BT = pad_sequence(ids, batch_first=True).to(device)
    labels_BT = pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX).to(device)
    places = [torch.full_like(row, place) for place, row in enumerate(ids)]
    row_BT = pad_sequence(places, batch_first=True, padding_value=-1).to(device)
    inputs = {"input_ids": input_ids_BT, "attention_mask": (row_BT >= 0).long()}
    for_teacher = None
    if any(map(is_told_more, rows)):
        for_teacher = _collate([as_teacher_sees(row) if is_told_more(row) else row for row in rows], domain, device)
    return Batch(inputs, labels_BT, row_BT, (domain,) * len(rows), for_teacher=for_teacher)


def _refuse_prompt_learning(model: PreTrainedModel) -> None:
    for name, config in getattr(model, "peft_config", {}).items():
        if config.is_prompt_learning:
            raise UserError(
                f"adapter {name!r} is a {config.peft_type.value} adapter: its virtual tokens are added outside the "
                "backbone, so hidden states taken from it would be those of the model without the adapter. Use LoRA."
            )
