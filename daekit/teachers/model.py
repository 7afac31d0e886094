"""A frozen model as teacher: one forward per batch, hidden states of the kept positions, its output head."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.models.backbone import add_on_hidden, frozen_forward, require_plain_head
from daekit.models.heads import output_head
from daekit.models.hollow import is_hollow
from daekit.models.identity import fingerprint
from daekit.models.internals import Watch, Watched, kept_states
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.offload import LayerOffload
from daekit.models.placement import batch_on, head_on, hold_ends, input_device, internals_on
from daekit.models.vocabulary import require_same
from daekit.protocol import Batch, OutputHead, Signal, Voice
from daekit.recipe.schema import ModelSpec
from daekit.teachers.sharding import Sharding


class ModelTeacher:
    """A frozen causal language model that speaks for every row it is asked about.

    Args:
        model: the model; its parameters are frozen and it runs in eval mode.
        vocab_size: V, the number of ids of the student's tokenizer.
        name: what errors and provenance call it.
        offload: keep its layers in host memory, see ``daekit.models.offload``; else it may be on other devices than the
            student (``device_map``), and what it says crosses over.
    """

    def __init__(self, model: PreTrainedModel, vocab_size: int, name: str = "teacher", offload: bool = False) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self._offload = offload
        self.layers: LayerOffload | None = None  # once it is offloaded
        self._head_there: OutputHead | None = None
        add_on_hidden(model)
        self._vocab_size = vocab_size
        self._watched: Watched | None = None
        self._identity: dict[str, object] | None = None
        if not is_hollow(model):  # the rank that has read its weights looks at them
            hold_ends(model)
            require_plain_head(model, vocab_size)  # also finds a head that is too narrow, here and not in the first step

    @classmethod
    def from_pretrained(
        cls, path: str, student_tokenizer: PreTrainedTokenizerBase, vocab_size: int, hollow: bool = False
    ) -> ModelTeacher:
        """Load a teacher from a directory or hub id; its tokenizer is compared before its weights are loaded.

        With ``hollow`` they are not loaded: the first rank has them, and ``shard`` brings this one's part.
        """
        spec = ModelSpec(path=path)
        require_same(student_tokenizer, load_tokenizer_of(spec), path)
        return cls(load_model(spec, hollow=hollow), vocab_size, path)

    def to(self, device: torch.device) -> ModelTeacher:
        """Move the model, unless quantisation or a device map has already placed it."""
        if self._offload and self.layers is None:
            self.layers = LayerOffload(self.model, device)
        placed = self.layers or getattr(self.model, "hf_device_map", None) or getattr(self.model, "is_quantized", False)
        if not placed:
            self.model.to(device)  # type: ignore[arg-type]
        return self

    def shard(self, sharding: Sharding) -> None:
        """Split the model, once, unless a device map or offloading has placed it; its fingerprint is taken before."""
        if self._identity is None:
            self._identity = sharding.of_first({} if is_hollow(self.model) else self.identity())
            if self._offload or getattr(self.model, "hf_device_map", None):
                self.to(sharding.device)
            else:
                sharding.split(self.model)

    def watch(self, watch: Watch | None) -> list[Watched]:
        """See ``WatchableTeacher``."""
        self._watched = None if watch is None else watch.of(self.model.config)
        return [] if self._watched is None else [self._watched]

    def signals(self, batch: Batch) -> list[Signal]:
        """One signal for all kept positions: hidden states ``[N, H]`` and the output head."""
        device = batch.labels_BT.device
        with frozen_forward(self.model):
            hidden_NH, internals = kept_states(self.model, batch_on(batch, input_device(self.model, device)), self._watched)
        positions = torch.arange(hidden_NH.shape[0], device=device)
        voice = Voice(hidden_NH.to(device), self._head(device))
        internals = None if internals is None else internals_on(internals, batch)
        return [Signal(positions, (voice,), internals=internals)]

    def _head(self, device: torch.device) -> OutputHead:
        """The output head where the student is; copied once if the model is elsewhere."""
        head = output_head(self.model, self._vocab_size)
        if head.weight.device == device:
            return head
        if self._head_there is None or self._head_there.weight.device != device:
            self._head_there = head_on(head, device)
        return self._head_there

    def identity(self) -> dict[str, object]:
        """The model's type and a fingerprint of its weights."""
        if self._identity is not None:
            return self._identity
        return {"kind": "model", "model_type": self.model.config.model_type, "weights": fingerprint(self.model)}
