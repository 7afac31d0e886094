"""What folders of the package hand to each other: a Batch, the TeacherOutputs for it, the output head both are scored with.

Shape legend, used as suffixes of names everywhere (``hidden_NH``):

====  ==========================================================================================
B     sequences of a batch as the model sees them (1 when the batch is flattened without padding)
T     positions of a sequence, tokens
R     rows: rows of the data (documents); B of them when padded, several per sequence when packed
N     loss positions: those that predict a token that carries loss (the label of the next token is not -100)
M     the loss positions that one TeacherOutput covers, M <= N
H     width of the hidden states (teacher and student may differ)
V     scored columns of the vocabulary, ``len(tokenizer)``
K     tokens of a sparse distribution, the most likely ones; experts of a token; keys of a block of attention
A, G  heads of the queries, heads of the keys of an attention (G divides A)
D     width of such a head; draws of a token
Q     queries of a block of attention
P     positions that are not padding; programs of a kernel
E, F  experts of a layer, neurons of an MLP; X all of these in a row, W those of a new MLP, U units of any kind
S     pairs of a token and an expert that it is sent to; tokens drawn for a row
L     layers; in kernels a step of a walk
O, I  outputs and inputs of a matrix; in kernels the block that a program holds and those that it walks over
====  ==========================================================================================

In the kernel of the prediction loss B is a block of the vocabulary, in ``top_k.py`` the buckets: K tokens and the tail.
A digit is itself: ``bounds_R1`` has R + 1 entries, ``pairs_R8`` 8 columns, ``ids_1T`` one sequence.
Everything here is a plain container: no weights are loaded and no loss is computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

IGNORE_INDEX = -100


@dataclass(frozen=True)
class OutputHead:
    """The vocabulary projection of a model: ``logits = softcap(scale * (hidden @ weight.T + bias))``."""

    weight: Tensor  # [>=V, H]; rows at and beyond V (padding of the vocabulary) are never scored
    bias: Tensor | None  # [>=V]
    vocab_size: int  # V, the number of columns that exist in the tokenizer
    scale: float = 1.0  # multiplier of the logits (Cohere, Granite)
    softcap: float | None = None  # softcap * tanh(logits / softcap) (Gemma); None for most models


@dataclass(frozen=True)
class Batch:
    """A collated batch with the domain of each of its rows."""

    inputs: dict[str, Any]  # arguments of forward: input_ids, attention_mask [B, T]; flattened: position_ids, cu_seq_lens_*
    labels_BT: Tensor  # token ids, -100 where no loss is wanted
    row_BT: Tensor  # the row that each position belongs to, -1 on padding
    domains: tuple[str, ...]  # of each row
    on_policy: tuple[bool, ...] = ()  # whether the student wrote the row's response, which is no label then; empty: none
    for_teacher: Batch | None = None  # the same rows and loss positions behind the prompts that teachers see instead

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
        domains = tuple(self.domains[row] for row in rows)
        renumbered = self.row_BT.new_full((len(self.domains) + 1,), -1)  # the last one is padding's, row -1
        renumbered[rows] = torch.arange(len(rows), device=self.row_BT.device, dtype=self.row_BT.dtype)
        size, length = self.labels_BT.shape
        tensors = {key: value for key, value in self.inputs.items() if isinstance(value, Tensor)}
        if "attention_mask" in self.inputs or "position_ids" not in self.inputs:
            index = torch.tensor(rows, device=self.labels_BT.device)
            of_rows = {key: value[index] for key, value in tensors.items() if value.ndim > 0 and value.shape[0] == size}
            return Batch(self.inputs | of_rows, self.labels_BT[index], renumbered[self.row_BT[index]], domains)
        row_T = renumbered[self.row_BT[0]]
        wanted_T = row_T >= 0
        inputs: dict[str, Any] = {
            key: value[:, wanted_T] for key, value in tensors.items() if value.shape == (1, length) and key != "seq_idx"
        }
        inputs |= packed_lengths(inputs["position_ids"])
        inputs |= {key: value for key, value in self.inputs.items() if isinstance(value, bool)}
        return Batch(inputs, self.labels_BT[:, wanted_T], row_T[wanted_T][None], domains)


def packed_lengths(position_ids_1T: Tensor) -> dict[str, Tensor | int]:
    """Sequence boundaries of a flattened batch, under the names that transformers' FlashAttention path reads.

    Mirrors TRL's ``DataCollatorForLanguageModeling``, so that a selection of documents looks as if it had been collated so.
    """
    starts = (position_ids_1T[0] == 0).nonzero().flatten()
    end = torch.tensor([position_ids_1T.shape[1]], device=starts.device)
    cumulative = torch.cat([starts, end]).to(torch.int32)
    lengths = cumulative.diff()
    documents_T = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32, device=starts.device), lengths)
    found: dict[str, Tensor | int] = {f"cu_seq_lens_{side}": cumulative for side in "qk"}
    return found | {f"max_length_{side}": int(lengths.max()) for side in "qk"} | {"seq_idx": documents_T[None]}


@dataclass(frozen=True)
class RowLayout:
    """Where the R rows of a batch lie in its ``[B, T]`` positions, and which loss positions each of them has."""

    sequence_R: Tensor  # index of the sequence that holds the row
    start_R: Tensor  # position of its first token in that sequence
    length_R: Tensor  # number of its tokens
    bounds_R1: Tensor  # row r has the loss positions bounds_R1[r] .. bounds_R1[r + 1] - 1 of the N
    offset_N: Tensor  # each loss position, counted from the start of its row


@dataclass(frozen=True)
class AttentionLayer:
    """Queries and keys of one attention layer, as its softmax meets them (after rotary embedding).

    A query at offset q of its row attends to the keys of that row at the offsets ``k <= q``, with a window to those with
    ``q - k < window``; the weights are ``softmax(scaling * q @ k)``.
    """

    query_NAD: Tensor  # at the loss positions
    key_BGTD: Tensor  # at all positions; head a of the queries goes with head a // (A / G) of the keys
    scaling: float
    window: int | None = None  # tokens that a query of sliding-window attention sees; None: all of the row


LayerChoice = str | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class FeatureSpec:
    """Which features of its teachers a student is compared with: queries and keys of attention, hidden states."""

    student: PreTrainedConfig  # its depth and its heads count
    attention: LayerChoice | None = None  # layers whose attention is compared, see ``daekit.models.features.match_layers``
    hidden: LayerChoice | None = None  # layers whose hidden states are compared
    relation_heads: int | None = None  # attention is compared in so many; None: in the model's own heads, one to one


@dataclass(frozen=True)
class FeatureLayers:
    """Student's layer -> the layer of one teacher that it follows, and the width of that teacher's hidden states."""

    attention: Mapping[int, int]
    hidden: Mapping[int, int]
    width: int


@dataclass(frozen=True)
class Features:
    """Features of a teacher's layers, keyed by the layer of the *student* that follows."""

    layout: RowLayout  # of the batch that the teacher saw; its loss positions are those of the TeacherOutput, in that order
    attention: Mapping[int, AttentionLayer]
    hidden_MH: Mapping[int, Tensor]  # behind the teacher's layer, at the loss positions


@dataclass(frozen=True)
class Member:
    """One model at M loss positions: ``hidden_MH`` scored by ``head``, with its ``weight`` among the members."""

    hidden_MH: Tensor
    head: OutputHead
    weight: float = 1.0


@dataclass(frozen=True)
class TopK:
    """A sparse distribution: its K most likely tokens; all other tokens together are one bucket, the tail."""

    ids_MK: Tensor  # different ones in each row
    log_probs_MK: Tensor  # nats, float32 or float64; fp16 with tail_log_mass_M, for their rounding is larger than a tail
    temperature: float = 1.0  # of the softmax that they come from; the loss must have the same
    # Log of the probability of all other tokens, float32 or float64; None: 1 - the sum of the named ones. Named probabilities
    # and tail are scaled to sum to 1, which takes out the rounding of the former.
    tail_log_mass_M: Tensor | None = None


@dataclass(frozen=True)
class TeacherOutput:
    """The distributions of one teacher at some loss positions of a batch: of one member, or a mean of several."""

    positions_M: Tensor  # indices into the N loss positions of the batch
    members: tuple[Member, ...]  # their weights sum to 1; none where ``top_k`` is given
    average: str = "logits"  # whose weighted mean is taken, after the temperature: logits (BabyLlama-2) or probabilities
    top_k: TopK | None = None  # a sparse distribution instead of members: what a cache, a server or labels give
    features: Features | None = None  # only where they were asked for, and of one member

    def at(self, index: Tensor) -> TeacherOutput:
        """The distributions at some of the M positions, by a mask or by indices; the features as they are."""
        top_k = self.top_k
        if top_k is not None:
            tail_M = None if top_k.tail_log_mass_M is None else top_k.tail_log_mass_M[index]
            top_k = TopK(top_k.ids_MK[index], top_k.log_probs_MK[index], top_k.temperature, tail_M)
        members = tuple(replace(member, hidden_MH=member.hidden_MH[index]) for member in self.members)
        return replace(self, positions_M=self.positions_M[index], members=members, top_k=top_k)


@runtime_checkable
class Teacher(Protocol):
    """Yields TeacherOutputs for a batch: without gradient, in eval mode, each loss position covered exactly once."""

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """The outputs for ``batch``, the rows as the student sees them; together they cover its N loss positions exactly once.

        ``capture`` says which features to hand out beside; only a ``FeatureTeacher`` is asked for some.
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
