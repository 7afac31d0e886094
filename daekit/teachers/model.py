"""A frozen model as teacher: one forward per batch, hidden states of the loss positions, its output head."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from daekit.models.backbone import add_on_hidden, frozen_forward
from daekit.models.features import layers_of, require_capturable, states_and_features
from daekit.models.heads import output_head
from daekit.models.identity import fingerprint
from daekit.models.loading import load_model, load_tokenizer_of
from daekit.models.offload import LayerOffload
from daekit.models.placement import free_memory, hold_ends, input_device, moved
from daekit.models.split_loading import waits
from daekit.models.start_checks import require_plain_head
from daekit.models.vocabulary import require_same
from daekit.models.zero3_loading import in_own_dtype
from daekit.protocol import Batch, FeatureLayers, FeatureSpec, Member, OutputHead, TeacherOutput
from daekit.recipe.schema import ModelSpec
from daekit.teachers.sharding import Sharding


class ModelTeacher:
    """A frozen causal language model that covers every row of a batch.

    Args:
        model: the model; its parameters are frozen and it runs in eval mode.
        vocab_size: V, the number of ids of the student's tokenizer.
        name: Name of the teacher in errors and provenance.
        offload: keep its layers in host memory, see ``daekit.models.offload``; else it may be on other devices than the
            student (``device_map``), and its outputs are moved to the student's.
        whole: each rank holds it whole, where FSDP2 or ZeRO-3 would split it.
    """

    def __init__(
        self, model: PreTrainedModel, vocab_size: int, name: str = "teacher", offload: bool = False, whole: bool = False
    ) -> None:
        self.model = model.requires_grad_(False).eval()
        self.name = name
        self._offload, self._whole = offload, whole
        self.layers: LayerOffload | None = None  # once it is offloaded
        self._head_there: OutputHead | None = None
        hold_ends(model)
        add_on_hidden(model)
        self._vocab_size = vocab_size
        self._identity: dict[str, object] | None = None
        if not waits(model):
            require_plain_head(model, vocab_size)  # also finds a head that is too narrow, here and not in the first step

    @classmethod
    def from_pretrained(
        cls, path: str, student_tokenizer: PreTrainedTokenizerBase, vocab_size: int, split: bool = False
    ) -> ModelTeacher:
        """Load a teacher from a directory or hub id; its tokenizer is compared before its weights are loaded.

        With ``split`` its weights are read when a trainer splits it over the ranks (``load_model``).
        """
        spec = ModelSpec(path=path)
        require_same(student_tokenizer, load_tokenizer_of(spec), path)
        with in_own_dtype():
            return cls(load_model(spec, split=split), vocab_size, path)

    def frozen_models(self) -> list[tuple[str, PreTrainedModel]]:
        """See ``TeacherOfModels``."""
        return [(self.name, self.model)]

    def to(self, device: torch.device) -> ModelTeacher:
        """Move the model, unless quantisation or a device map has already placed it."""
        if self._offload and self.layers is None:
            self.layers = LayerOffload(self.model, device)
        placed = self.layers or getattr(self.model, "hf_device_map", None) or getattr(self.model, "is_quantized", False)
        if not placed:
            self.model.to(device)  # type: ignore[arg-type]
        return self

    def shard(self, sharding: Sharding) -> None:
        """Split the model, once, unless a device map or offloading has placed it; its fingerprint is taken before.

        One that waits on the disk is read then, and only after that looked at.
        """
        if self._identity is None and waits(self.model):
            sharding.split(self.model)
            require_plain_head(self.model, self._vocab_size)
            free_memory()
            self._identity = self.identity()
        elif self._identity is None:
            self._identity = self.identity()
            # quantisation has placed it where it is quantised, which is no wish of the user's
            placed = getattr(self.model, "hf_device_map", None) and not getattr(self.model, "is_quantized", False)
            if self._offload or placed:
                self.to(sharding.device)
            elif self._whole:
                sharding.hold(self.model)
            else:
                sharding.split(self.model)

    def feature_layers(self, spec: FeatureSpec) -> list[FeatureLayers]:
        """See ``FeatureTeacher``."""
        layers = layers_of(spec, self.model.config)
        require_capturable(self.model, layers)
        return [layers]

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """One output for all loss positions: hidden states ``[N, H]`` and the output head."""
        device = batch.labels_BT.device
        there = input_device(self.model, device)
        with frozen_forward(self.model):
            hidden_NH, features = states_and_features(self.model, batch if there == device else moved(batch, there), capture)
        positions = torch.arange(hidden_NH.shape[0], device=device)
        member = Member(hidden_NH.to(device), self._head(device))
        return [TeacherOutput(positions, (member,), features=moved(features, device))]

    def _head(self, device: torch.device) -> OutputHead:
        """The output head where the student is; copied once if the model is elsewhere."""
        head = output_head(self.model, self._vocab_size)
        if head.weight.device == device:
            return head
        if self._head_there is None or self._head_there.weight.device != device:
            self._head_there = moved(head, device)
        return self._head_there

    def identity(self) -> dict[str, object]:
        """The model's type and a fingerprint of its weights."""
        if self._identity is not None:
            return self._identity
        return {"kind": "model", "model_type": self.model.config.model_type, "weights": fingerprint(self.model)}
