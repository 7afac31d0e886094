"""A LoRA adapter of the student's own base as teacher: a second model at the price of an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from daekit.errors import UserError
from daekit.models.adapters import adapter_parameters, load_frozen, require_adapters_fit
from daekit.models.backbone import add_on_hidden, base_of, frozen_forward
from daekit.models.features import layers_of, states_and_features
from daekit.models.heads import output_head
from daekit.models.identity import hash_tensors
from daekit.models.sharded import is_sharded, whole
from daekit.models.split_loading import waits
from daekit.protocol import Batch, FeatureLayers, FeatureSpec, Member, TeacherOutput
from daekit.recipe.schema import ModelSpec
from daekit.teachers.sharding import Sharding


class OnStudent:
    """A teacher that is only named yet: whoever asks it gets a UserError, for it has no model before a trainer has made one."""

    def outputs(self, *_: Any, **__: Any) -> Any:
        """Refused, as is all that is asked of a teacher."""
        raise UserError(
            f"{self}: names a teacher on the student's own base, which a trainer makes of it; it has no outputs of its own. "
            "Give it to a trainer, or load an adapter with AdapterTeacher.from_pretrained(model, path, vocab_size)."
        )

    identity = to = outputs


@dataclass(frozen=True)
class AdapterPath(OnStudent):
    """Names a LoRA adapter of the student's own base, of which the trainers make an AdapterTeacher.

    Give it to ``KDTrainer`` or ``DAETrainer`` wherever a teacher is wanted, also as a member of an ensemble; the student must
    be a LoRA student (``peft_config``, or a PEFT model).

    Attributes:
        path: directory of the adapter; None: the bare base, ``BASE``.
    """

    path: str | None

    def require_student(self, has_adapter: bool, base: ModelSpec | None) -> None:
        """See ``TeacherOnStudent``.

        Raises:
            UserError: a student without an adapter; an adapter of another base, incomplete, or on the output head or
                embeddings. Of a student that is loaded already, its adapters are compared when they are loaded.
        """
        if not has_adapter:
            raise UserError(
                f"{self}: is an adapter of the student's base, but the student is trained whole. Give peft_config to make it a "
                "LoRA student, or give a merged model as teacher."
            )
        if self.path is not None and base is not None:
            require_adapters_fit([self.path], base)

    def on_student(self, student: nn.Module, vocab_size: int) -> AdapterTeacher:
        """The adapter loaded onto the student's base; see ``AdapterTeacher.from_pretrained``."""
        assert isinstance(student, PeftModel), "require_student has looked"
        if self.path is None:
            return AdapterTeacher(student, None, vocab_size)
        return AdapterTeacher.from_pretrained(student, self.path, vocab_size)


BASE = AdapterPath(None)


class AdapterTeacher:
    """The student's base with another adapter switched on, or with none.

    The student's adapter is active again, and every ``requires_grad`` flag as it was, before this returns: with gradient
    checkpointing, a teacher's adapter left active until the backward pass gives the student a gradient of exactly zero.

    Args:
        model: the PEFT model that the student is trained in.
        adapter: name of a loaded adapter, or None for the bare base.
        vocab_size: V, the number of ids of the tokenizer.

    Raises:
        UserError: the model has no adapter of that name, or an adapter that trains biases of the base.
    """

    def __init__(self, model: PeftModel, adapter: str | None, vocab_size: int) -> None:
        if adapter is not None and adapter not in model.peft_config:
            raise UserError(f"adapter {adapter!r} is not loaded; the model has: {', '.join(sorted(model.peft_config))}")
        _require_fixed_base(model)
        self.model = model
        self.adapter = adapter
        self.vocab_size = vocab_size
        self._identity: dict[str, object] | None = None
        add_on_hidden(model)
        if adapter is not None:
            for parameter in adapter_parameters(model, adapter).values():
                parameter.requires_grad_(False)

    @classmethod
    def from_pretrained(cls, model: PeftModel, path: str | Path, vocab_size: int, name: str | None = None) -> AdapterTeacher:
        """Load the LoRA adapter in a directory onto the student's base, frozen; see ``daekit.models.adapters``.

        Args:
            model: the PEFT model that the student is trained in.
            path: a directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
            vocab_size: V.
            name: Name of the adapter in PEFT; default: ``daekit_teacher_N``.

        Raises:
            UserError: an adapter of another base, with missing tensors or other shapes, or on the output head or embeddings.
        """
        _require_fixed_base(model)
        if name is None:
            name = next(free for n in count() if (free := f"daekit_teacher_{n}") not in model.peft_config)
        load_frozen(model, path, name)
        return cls(model, name, vocab_size)

    @classmethod
    def copy_of_active(cls, model: PeftModel, name: str, vocab_size: int) -> AdapterTeacher:
        """Freeze the student as it stands: its adapter is copied, value by value and dtype by dtype, under ``name``."""
        _require_fixed_base(model)
        student = model.active_adapter
        config = copy.deepcopy(model.peft_config[student])
        config.inference_mode = True
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # PiSSA, OLoRA... would take their initial values from the base once more
        flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
        model.add_adapter(name, config)
        twins = adapter_parameters(model, name)
        with torch.no_grad():
            for key, parameter in adapter_parameters(model, student).items():
                twins[key].data = whole(parameter).to(parameter.device)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(flags.get(key, False))
        return cls(model, name, vocab_size)

    def feature_layers(self, spec: FeatureSpec) -> list[FeatureLayers]:
        """See ``FeatureTeacher``."""
        return [layers_of(spec, base_of(self.model).config)]

    def outputs(self, batch: Batch, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
        """One output for all loss positions: hidden states ``[N, H]`` and the output head."""
        with _switched_to(self.model, self.adapter):
            return current_outputs(self.model, batch, self.vocab_size, capture)

    def to(self, device: torch.device) -> AdapterTeacher:
        """Nothing to move: the weights are the student's."""
        return self

    def shard(self, sharding: Sharding) -> None:
        """Nothing to split: the weights are split with the student's. The fingerprint is taken before, if they are there."""
        if not waits(self.model):
            self._identity = self.identity()

    def identity(self) -> dict[str, object]:
        """Fingerprints of the adapter (None: the bare base) and of the base without any adapter."""
        if self._identity is not None:
            return self._identity
        adapters = {name: adapter_parameters(self.model, name) for name in self.model.peft_config}
        learnt = {id(parameter) for parameters in adapters.values() for parameter in parameters.values()}
        base = hash_tensors((name, p) for name, p in base_of(self.model).named_parameters() if id(p) not in learnt)
        weights = None if self.adapter is None else hash_tensors(adapters[self.adapter].items())
        found: dict[str, object] = {"kind": "adapter", "weights": weights, "base": base}
        if any(map(is_sharded, self.model.parameters())):  # gathered once; these weights do not change
            self._identity = found
        return found


def current_outputs(model: PeftModel, batch: Batch, vocab_size: int, capture: FeatureSpec | None = None) -> list[TeacherOutput]:
    """One output for all loss positions, of the model with whatever adapter is active now."""
    with frozen_forward(model):
        hidden_NH, features = states_and_features(model, batch, capture)
        head = output_head(model, vocab_size)
    positions = torch.arange(hidden_NH.shape[0], device=hidden_NH.device)
    return [TeacherOutput(positions, (Member(hidden_NH, head),), features=features)]


def _require_fixed_base(model: PeftModel) -> None:
    """Refuse a student whose adapter trains the biases of the base, which its other adapters share."""
    for name, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise UserError(
                f"peft_config of adapter {name!r}: bias={bias!r} trains biases of the base itself, so no teacher or reference "
                "on it would stay as it is. Use bias='none', or give the trainer another model (or its path) as reference."
            )


@contextmanager
def _switched_to(model: PeftModel, adapter: str | None) -> Iterator[None]:
    """Switch to an adapter (None: to the bare base) and back; PEFT flips ``requires_grad`` on the way, this does not."""
    student = model.active_adapter
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter)
            yield
    finally:
        model.set_adapter(student)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
