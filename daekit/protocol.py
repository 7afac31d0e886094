"""What the rooms hand to each other: a Batch, the Signals of a Teacher, and the output head both are scored with.

Shape legend, used as suffixes of names everywhere (``hidden_NH``):

====  ==========================================================================================
B     sequences of a batch as the model sees them (1 when the batch is flattened without padding)
T     positions of a sequence, tokens
R     rows: rows of the data (documents); B of them when padded, several per sequence when packed
N     kept positions: those that predict a token of the response (the label of the next token is not -100)
M     the kept positions that one Signal speaks for, M <= N
H     width of the hidden states (teacher and student may differ)
V     scored columns of the vocabulary, ``len(tokenizer)``
K     tokens of a sparse distribution, the most likely ones
A, G  heads of the queries, heads of the keys of an attention (G divides A)
D     width of such a head
====  ==========================================================================================

Everything here is a plain container: no weights are loaded and no loss is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class OutputHead:
    """The vocabulary projection of a model: ``logits = softcap(scale * (hidden @ weight.T + bias))``.

    Attributes:
        weight: ``[>=V, H]``; rows at and beyond ``vocab_size`` (padding of the vocabulary) are never scored.
        bias: ``[>=V]`` or None.
        vocab_size: V, the number of columns that exist in the tokenizer.
        scale: multiplier of the logits (Cohere, Granite), 1 for most models.
        softcap: ``softcap * tanh(logits / softcap)`` (Gemma), None for most models.
    """

    weight: Tensor
    bias: Tensor | None
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Batch:
    """A collated batch with the domain of each of its rows.

    Attributes:
        inputs: keyword arguments of the model's forward without labels (``input_ids [B,T]``, ``attention_mask [B,T]`` or,
            for a batch flattened without padding, ``position_ids [1,T]`` and the ``cu_seq_lens_*`` of TRL's collator).
        labels_BT: token ids, -100 where no loss is wanted.
        row_BT: index of the row that each position belongs to, -1 on padding.
        domains: name of the domain of each row, R names.
    """

    inputs: dict[str, Any]
    labels_BT: Tensor
    row_BT: Tensor
    domains: tuple[str, ...]

    @cached_property
    def kept_BT(self) -> Tensor:
        """``[B, T-1]`` bool: position t is kept when it predicts ``labels[t + 1] != -100``. The one shift."""
        return self.labels_BT[:, 1:] != IGNORE_INDEX

    @cached_property
    def labels_N(self) -> Tensor:
        """``[N]`` the token that each kept position predicts."""
        return self.labels_BT[:, 1:][self.kept_BT]

    @cached_property
    def row_N(self) -> Tensor:
        """``[N]`` the row of each kept position."""
        return self.row_BT[:, :-1][self.kept_BT]

    @cached_property
    def layout(self) -> RowLayout:
        """Where each row lies. The rows of a batch lie one after another, each in one piece."""
        sequence_P, position_P = (self.row_BT >= 0).nonzero(as_tuple=True)
        length_R = torch.bincount(self.row_BT[sequence_P, position_P], minlength=len(self.domains))
        first_R = length_R.cumsum(0) - length_R  # of each row, among the P positions that are not padding
        start_R = position_P[first_R]
        end_R1 = torch.bincount(self.row_N, minlength=len(self.domains)).cumsum(0)
        kept_R1 = torch.cat([end_R1.new_zeros(1), end_R1])
        position_N = self.kept_BT.nonzero(as_tuple=True)[1]
        return RowLayout(sequence_P[first_R], start_R, length_R, kept_R1, position_N - start_R[self.row_N])

    @cached_property
    def kept_N(self) -> Tensor:
        """``[N]`` the kept positions as indices into the flattened ``[B, T]``."""
        sequence_N, position_N = self.kept_BT.nonzero(as_tuple=True)
        return sequence_N * self.labels_BT.shape[1] + position_N

    def keep(self, values_BT: Tensor) -> Tensor:
        """``[N, ...]``: whatever ``[B, T, ...]`` holds at the kept positions, the hidden states for instance."""
        return values_BT.flatten(0, 1).index_select(0, self.kept_N.to(values_BT.device))

    def rows_of(self, names: Sequence[str]) -> list[int]:
        """Indices of the rows whose domain is one of ``names``."""
        return [row for row, domain in enumerate(self.domains) if domain in names]

    def positions_of(self, rows: Sequence[int]) -> Tensor:
        """``[M]`` indices into the N kept positions of those that belong to ``rows``, in the batch's order."""
        wanted = torch.zeros(len(self.domains), dtype=torch.bool, device=self.row_N.device)
        wanted[list(rows)] = True
        return wanted[self.row_N].nonzero().flatten()

    def select(self, rows: Sequence[int]) -> Batch:
        """The same batch with only ``rows``, in the batch's order: whole sequences when padded, whole documents when flattened.

        The kept positions of the result are those of ``positions_of(rows)``, in the same order.
        """
        rows = sorted(rows)
        if rows == list(range(len(self.domains))):
            return self
        if "attention_mask" in self.inputs or "position_ids" not in self.inputs:
            return self._select_sequences(rows)
        return self._select_documents(rows)

    def _select_sequences(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows, device=self.labels_BT.device)
        size = self.labels_BT.shape[0]
        inputs = {
            key: value[index] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size else value
            for key, value in self.inputs.items()
        }
        new_row = torch.full((len(self.domains) + 1,), -1, device=self.row_BT.device, dtype=self.row_BT.dtype)
        new_row[index] = torch.arange(len(rows), device=self.row_BT.device, dtype=self.row_BT.dtype)
        return replace(
            self,
            inputs=inputs,
            labels_BT=self.labels_BT[index],
            row_BT=new_row[self.row_BT[index]],
            domains=tuple(self.domains[row] for row in rows),
        )

    def _select_documents(self, rows: list[int]) -> Batch:
        new_row = torch.full((len(self.domains) + 1,), -1, device=self.row_BT.device, dtype=self.row_BT.dtype)
        new_row[rows] = torch.arange(len(rows), device=self.row_BT.device, dtype=self.row_BT.dtype)
        row_T = new_row[self.row_BT[0]]  # row -1 (padding) reads the last entry, -1
        wanted_T = row_T >= 0
        length = self.labels_BT.shape[1]
        inputs: dict[str, Any] = {
            key: value[:, wanted_T]
            for key, value in self.inputs.items()
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape == (1, length) and key != "seq_idx"
        }
        inputs |= packed_lengths(inputs["position_ids"])
        inputs |= {key: value for key, value in self.inputs.items() if isinstance(value, bool)}
        return replace(
            self,
            inputs=inputs,
            labels_BT=self.labels_BT[:, wanted_T],
            row_BT=row_T[wanted_T][None],
            domains=tuple(self.domains[row] for row in rows),
        )


def packed_lengths(position_ids_1T: Tensor) -> dict[str, Tensor | int]:
    """Sequence boundaries of a flattened batch, under the names that transformers' FlashAttention path reads.

    Mirrors TRL's ``DataCollatorForLanguageModeling``, so that a selection of documents looks as if it had been collated so.
    """
    starts = (position_ids_1T[0] == 0).nonzero().flatten()
    end = torch.tensor([position_ids_1T.shape[1]], device=starts.device)
    cumulative = torch.cat([starts, end]).to(torch.int32)
    lengths = cumulative.diff()
    longest = int(lengths.max())
    documents = torch.arange(lengths.numel(), dtype=torch.int32, device=starts.device)
    return {
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(documents, lengths)[None],
    }


@dataclass(frozen=True)
class RowLayout:
    """Where the R rows of a batch lie in its ``[B, T]`` positions, and which positions of each are kept.

    Attributes:
        sequence_R: index of the sequence that holds the row.
        start_R: position of its first token in that sequence.
        length_R: its tokens.
        kept_R1: ``[R + 1]``, the kept positions of row r are ``kept_R1[r] .. kept_R1[r + 1] - 1`` of the N.
        offset_N: each kept position, counted from the start of its row.
    """

    sequence_R: Tensor
    start_R: Tensor
    length_R: Tensor
    kept_R1: Tensor
    offset_N: Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """Queries and keys of one attention layer, as its softmax meets them (after rotary embedding).

    A query at offset q of its row attends to the keys of that row at the offsets ``k <= q``, with a window to those with
    ``q - k < window``; the weights are ``softmax(scaling * q @ k)``.

    Attributes:
        query_NAD: queries at the kept positions.
        key_BGTD: keys at all positions; head a of the queries goes with head ``a // (A / G)`` of the keys.
        scaling: factor of the scores.
        window: of a sliding-window attention, tokens; None: all of the row.
    """

    query_NAD: Tensor
    key_BGTD: Tensor
    scaling: float
    window: int | None = None


@dataclass(frozen=True)
class Internals:
    """What a teacher's layers did, kept for the losses that look inside; keyed by the layer of the *student* that follows.

    Attributes:
        layout: of the batch that the teacher saw: its kept positions are those of the Signal, in the same order.
        attention: student's layer -> queries and keys of the teacher's layer.
        hidden_MH: student's layer -> hidden states behind the teacher's layer, at the kept positions.
    """

    layout: RowLayout
    attention: Mapping[int, AttentionLayer]
    hidden_MH: Mapping[int, Tensor]


@dataclass(frozen=True)
class Voice:
    """One teacher's opinion on M kept positions: ``hidden_MH`` scored by ``head``, with its ``weight`` among the voices."""

    hidden_MH: Tensor
    head: OutputHead
    weight: float = 1.0


@dataclass(frozen=True)
class TopK:
    """A sparse distribution: its K most likely tokens; all other tokens together are one bucket, the tail.

    Attributes:
        ids_MK: the tokens, different ones in each row.
        log_probs_MK: their log-probabilities in nats at ``temperature``; the rest of 1 is the tail's.
        temperature: that of the softmax they come from; the loss must have the same.
    """

    ids_MK: Tensor
    log_probs_MK: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class Signal:
    """What one or several voices together say about some kept positions of a batch.

    Attributes:
        positions_M: indices into the N kept positions of the batch.
        voices: voices whose weights sum to 1; none where ``top_k`` is given.
        average: how several voices become one distribution, after the temperature: the weighted mean of their
            ``"logits"`` (BabyLlama-2) or of their ``"probabilities"``.
        top_k: a sparse distribution instead of voices (what a cache or a server gives).
        internals: what the attention and hidden-state losses need; only where they were asked for, and of one voice.
    """

    positions_M: Tensor
    voices: tuple[Voice, ...]
    average: str = "logits"
    top_k: TopK | None = None
    internals: Internals | None = None


@runtime_checkable
class Teacher(Protocol):
    """Yields Signals for a batch: without gradient, in eval mode, each kept position spoken for exactly once."""

    def signals(self, batch: Batch) -> list[Signal]:
        """The signals for ``batch``; together they cover its N kept positions exactly once."""
        ...

    def identity(self) -> dict[str, object]:
        """JSON-able facts that tell this teacher from another one: compared when a run resumes."""
        ...

    def to(self, device: torch.device) -> Teacher:
        """Move what can be moved to ``device``; returns itself."""
        ...
