"""What the rooms hand to each other: a Batch, the TeacherOutputs for it, and the output head both are scored with.

Shape legend, used as suffixes of names everywhere (``hidden_NH``):

====  ==========================================================================================
B     sequences of a batch as the model sees them (1 when the batch is flattened without padding)
T     positions of a sequence, tokens
R     rows: rows of the data (documents); B of them when padded, several per sequence when packed
N     loss positions: those that predict a token that carries loss (the label of the next token is not -100)
M     the loss positions that one TeacherOutput covers, M <= N
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
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
        on_policy: Whether the student wrote the response of each row, which is then no label; empty where it wrote none.
    """

    inputs: dict[str, Any]
    labels_BT: Tensor
    row_BT: Tensor
    domains: tuple[str, ...]
    on_policy: tuple[bool, ...] = ()

    @cached_property
    def loss_mask_BT(self) -> Tensor:
        """``[B, T-1]`` bool: position t carries loss when it predicts ``labels[t + 1] != -100``. The one shift."""
        return self.labels_BT[:, 1:] != IGNORE_INDEX

    @cached_property
    def labels_N(self) -> Tensor:
        """``[N]`` the token that each loss position predicts."""
        return self.labels_BT[:, 1:][self.loss_mask_BT]

    @cached_property
    def row_N(self) -> Tensor:
        """``[N]`` the row of each loss position."""
        return self.row_BT[:, :-1][self.loss_mask_BT]

    @cached_property
    def labelled_N(self) -> Tensor | None:
        """``[N]`` bool: whether each loss position predicts a label of the data; None where all do."""
        if not any(self.on_policy):
            return None
        return ~torch.tensor(self.on_policy, device=self.row_N.device)[self.row_N]

    @cached_property
    def row_share_N(self) -> Tensor:
        """``[N]`` one over the number of loss positions of the row of each."""
        return 1 / torch.bincount(self.row_N, minlength=len(self.domains))[self.row_N]

    @cached_property
    def layout(self) -> RowLayout:
        """Where each row lies. The rows of a batch lie one after another, each in one piece."""
        sequence_P, position_P = (self.row_BT >= 0).nonzero(as_tuple=True)
        length_R = torch.bincount(self.row_BT[sequence_P, position_P], minlength=len(self.domains))
        first_R = length_R.cumsum(0) - length_R  # of each row, among the P positions that are not padding
        start_R = position_P[first_R]
        end_R = torch.bincount(self.row_N, minlength=len(self.domains)).cumsum(0)
        bounds_R1 = torch.cat([end_R.new_zeros(1), end_R])
        position_N = self.loss_mask_BT.nonzero(as_tuple=True)[1]
        return RowLayout(sequence_P[first_R], start_R, length_R, bounds_R1, position_N - start_R[self.row_N])

    @cached_property
    def loss_index_N(self) -> Tensor:
        """``[N]`` the loss positions as indices into the flattened ``[B, T]``."""
        sequence_N, position_N = self.loss_mask_BT.nonzero(as_tuple=True)
        return sequence_N * self.labels_BT.shape[1] + position_N

    def at_loss_positions(self, values_BT: Tensor) -> Tensor:
        """``[N, ...]``: whatever ``[B, T, ...]`` holds at the loss positions, the hidden states for instance."""
        return values_BT.flatten(0, 1).index_select(0, self.loss_index_N.to(values_BT.device))

    def rows_of(self, names: Sequence[str]) -> list[int]:
        """Indices of the rows whose domain is one of ``names``."""
        return [row for row, domain in enumerate(self.domains) if domain in names]

    def positions_of(self, rows: Sequence[int]) -> Tensor:
        """``[M]`` indices into the N loss positions of those that belong to ``rows``, in the batch's order."""
        wanted = torch.zeros(len(self.domains), dtype=torch.bool, device=self.row_N.device)
        wanted[list(rows)] = True
        return wanted[self.row_N].nonzero().flatten()

    def select(self, rows: Sequence[int]) -> Batch:
        """The same batch with only ``rows``, in the batch's order: whole sequences when padded, whole documents when flattened.

        The loss positions of the result are those of ``positions_of(rows)``, in the same order.
        """
        rows = sorted(rows)
        if rows == list(range(len(self.domains))):
            return self
        if "attention_mask" in self.inputs or "position_ids" not in self.inputs:
            return self._select_sequences(rows)
        return self._select_documents(rows)

    def _renumbered(self, rows: list[int]) -> Tensor:
        """``[R + 1]``: old row -> new row, -1 for rows that are left out; the last entry is that of padding, row -1."""
        new_row = torch.full((len(self.domains) + 1,), -1, device=self.row_BT.device, dtype=self.row_BT.dtype)
        new_row[rows] = torch.arange(len(rows), device=self.row_BT.device, dtype=self.row_BT.dtype)
        return new_row

    def _select_sequences(self, rows: list[int]) -> Batch:
        index = torch.tensor(rows, device=self.labels_BT.device)
        size = self.labels_BT.shape[0]
        inputs = {
            key: value[index] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size else value
            for key, value in self.inputs.items()
        }
        row_BT = self._renumbered(rows)[self.row_BT[index]]
        return Batch(inputs, self.labels_BT[index], row_BT, tuple(self.domains[row] for row in rows))

    def _select_documents(self, rows: list[int]) -> Batch:
        row_T = self._renumbered(rows)[self.row_BT[0]]
        wanted_T = row_T >= 0
        length = self.labels_BT.shape[1]
        inputs: dict[str, Any] = {
            key: value[:, wanted_T]
            for key, value in self.inputs.items()
            if isinstance(value, Tensor) and value.ndim == 2 and value.shape == (1, length) and key != "seq_idx"
        }
        inputs |= packed_lengths(inputs["position_ids"])
        inputs |= {key: value for key, value in self.inputs.items() if isinstance(value, bool)}
        domains = tuple(self.domains[row] for row in rows)
        return Batch(inputs, self.labels_BT[:, wanted_T], row_T[wanted_T][None], domains)


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
    """Where the R rows of a batch lie in its ``[B, T]`` positions, and which loss positions each of them has.

    Attributes:
        sequence_R: Index of the sequence that holds the row.
        start_R: Position of the row's first token in that sequence.
        length_R: Number of its tokens.
        bounds_R1: ``[R + 1]``; row r has the loss positions ``bounds_R1[r] .. bounds_R1[r + 1] - 1`` of the N.
        offset_N: each loss position, counted from the start of its row.
    """

    sequence_R: Tensor
    start_R: Tensor
    length_R: Tensor
    bounds_R1: Tensor
    offset_N: Tensor


@dataclass(frozen=True)
class AttentionLayer:
    """Queries and keys of one attention layer, as its softmax meets them (after rotary embedding).

    A query at offset q of its row attends to the keys of that row at the offsets ``k <= q``, with a window to those with
    ``q - k < window``; the weights are ``softmax(scaling * q @ k)``.

    Attributes:
        query_NAD: queries at the loss positions.
        key_BGTD: keys at all positions; head a of the queries goes with head ``a // (A / G)`` of the keys.
        scaling: factor of the scores.
        window: Tokens that a query of sliding-window attention sees; None: all of the row.
    """

    query_NAD: Tensor
    key_BGTD: Tensor
    scaling: float
    window: int | None = None


LayerChoice = str | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of its teachers a student is compared with: queries and keys of attention, hidden states.

    Attributes:
        student: the student's config; its depth and its heads count.
        attention: Layers whose attention is compared, as for ``daekit.models.features.match_layers``; None: none.
        hidden: Layers whose hidden states are compared; None: none.
        relation_heads: Attention is compared in so many relation heads; None: in the model's own heads, one to one.
    """

    student: PreTrainedConfig
    attention: LayerChoice | None = None
    hidden: LayerChoice | None = None
    relation_heads: int | None = None


@dataclass(frozen=True)
class FeatureLayers:
    """Student's layer -> the layer of one teacher that it follows, and the width of that teacher's hidden states."""

    attention: Mapping[int, int]
    hidden: Mapping[int, int]
    width: int


@dataclass(frozen=True)
class Features:
    """Features of a teacher's layers, keyed by the layer of the *student* that follows.

    Attributes:
        layout: Layout of the batch that the teacher saw; its loss positions are those of the TeacherOutput, in the same order.
        attention: student's layer -> queries and keys of the teacher's layer.
        hidden_MH: student's layer -> hidden states behind the teacher's layer, at the loss positions.
    """

    layout: RowLayout
    attention: Mapping[int, AttentionLayer]
    hidden_MH: Mapping[int, Tensor]


@dataclass(frozen=True)
class Member:
    """One model at M loss positions: ``hidden_MH`` scored by ``head``, with its ``weight`` among the members."""

    hidden_MH: Tensor
    head: OutputHead
    weight: float = 1.0


@dataclass(frozen=True)
class TopK:
    """A sparse distribution: its K most likely tokens; all other tokens together are one bucket, the tail.

    Attributes:
        ids_MK: the tokens, different ones in each row.
        log_probs_MK: their log-probabilities in nats at ``temperature``; in float32 or float64, or in fp16 with
            ``tail_log_mass_M``. 16-bit values cannot say what the tail holds: rounding is larger than that.
        temperature: Temperature of the softmax that they come from; the loss must have the same.
        tail_log_mass_M: log of the probability of all other tokens, float32 or float64; None: 1 - the sum of the named
            ones. Named probabilities and tail are scaled to sum to 1, which takes out the rounding of the former.
    """

    ids_MK: Tensor
    log_probs_MK: Tensor
    temperature: float = 1.0
    tail_log_mass_M: Tensor | None = None


@dataclass(frozen=True)
class TeacherOutput:
    """The distributions of one teacher at some loss positions of a batch: of one member, or a mean of several.

    Attributes:
        positions_M: indices into the N loss positions of the batch.
        members: members whose weights sum to 1; none where ``top_k`` is given.
        average: how several members become one distribution, after the temperature: the weighted mean of their
            ``"logits"`` (BabyLlama-2) or of their ``"probabilities"``.
        top_k: a sparse distribution instead of members (what a cache or a server gives).
        features: Features for the attention and hidden-state losses; only where they were asked for, and of one member.
    """

    positions_M: Tensor
    members: tuple[Member, ...]
    average: str = "logits"
    top_k: TopK | None = None
    features: Features | None = None


@runtime_checkable
class Teacher(Protocol):
    """Yields TeacherOutputs for a batch: without gradient, in eval mode, each loss position covered exactly once."""

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """The outputs for ``batch``; together they cover its N loss positions exactly once.

        Args:
            batch: The rows, as the student sees them.
            capture: The features to hand out beside; None: none. Only a ``FeatureTeacher`` is asked for some.
        """
        ...

    def identity(self) -> dict[str, object]:
        """JSON-able facts that tell this teacher from another one: compared when a run resumes."""
        ...

    def to(self, device: torch.device) -> Teacher:
        """Move what can be moved to ``device``; returns itself."""
        ...


@runtime_checkable
class FeatureTeacher(Teacher, Protocol):
    """A teacher whose outputs carry the features that ``capture`` asks for."""

    def feature_layers(self, spec: FeatureSpec) -> list[FeatureLayers]:
        """The layers that ``spec`` means in each of its models.

        Raises:
            UserError: the student's layers or heads have no counterpart here.
        """
        ...
