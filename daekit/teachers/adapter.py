"""A LoRA adapter of the student's own base as teacher: a second model at the price of an adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from daekit.errors import UserError
from daekit.models.backbone import add_on_hidden, base_of, frozen_forward
from daekit.models.heads import output_head
from daekit.models.identity import hash_tensors
from daekit.models.internals import Watch, Watched, kept_states
from daekit.models.sharded import whole
from daekit.protocol import Batch, Signal, Voice
from daekit.teachers.sharding import Sharding


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
        self._vocab_size = vocab_size
        self._watched: Watched | None = None
        self._identity: dict[str, object] | None = None
        add_on_hidden(model)
        if adapter is not None:
            for parameter in adapter_parameters(model, adapter).values():
                parameter.requires_grad_(False)

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

    def watch(self, watch: Watch | None) -> list[Watched]:
        """See ``WatchableTeacher``."""
        self._watched = None if watch is None else watch.of(self.model.config)
        return [] if self._watched is None else [self._watched]

    def signals(self, batch: Batch) -> list[Signal]:
        """One signal for all kept positions: hidden states ``[N, H]`` and the output head."""
        with frozen_forward(self.model), _speaking(self.model, self.adapter):
            hidden_NH, internals = kept_states(self.model, batch, self._watched)
            head = output_head(self.model, self._vocab_size)
        positions = torch.arange(hidden_NH.shape[0], device=hidden_NH.device)
        return [Signal(positions, (Voice(hidden_NH, head),), internals=internals)]

    def to(self, device: torch.device) -> AdapterTeacher:
        """Nothing to move: the weights are the student's."""
        return self

    def shard(self, sharding: Sharding) -> None:
        """Nothing to split: the engine does it with the student. The fingerprint is taken before."""
        self._identity = self.identity()

    def identity(self) -> dict[str, object]:
        """Fingerprints of the adapter (None: the bare base) and of the base without any adapter."""
        if self._identity is not None:
            return self._identity
        adapters = {name: adapter_parameters(self.model, name) for name in self.model.peft_config}
        learnt = {id(parameter) for parameters in adapters.values() for parameter in parameters.values()}
        base = hash_tensors((name, p) for name, p in base_of(self.model).named_parameters() if id(p) not in learnt)
        weights = None if self.adapter is None else hash_tensors(adapters[self.adapter].items())
        return {"kind": "adapter", "weights": weights, "base": base}


def adapter_parameters(model: PeftModel, adapter: str) -> dict[str, nn.Parameter]:
    """Parameters of one adapter, by their name with the adapter's own name taken out.

    They are looked for where PEFT's layers keep them, for a part of the base may bear an adapter's name (``mlp``).
    """
    homes = tuple(
        f"{path}.{part}.{adapter}"
        for path, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for part in layer.adapter_layer_names
    )
    found = {}
    for name, parameter in model.named_parameters():
        home = next((home for home in homes if name == home or name.startswith(home + ".")), None)
        if home is not None:
            found[home.removesuffix(f".{adapter}") + name.removeprefix(home)] = parameter
    return found


def _require_fixed_base(model: PeftModel) -> None:
    """Refuse a student whose adapter trains the biases of the base, which its other adapters speak with."""
    for name, config in model.peft_config.items():
        bias = getattr(config, "bias", "none")
        if bias != "none":
            raise UserError(
                f"peft_config of adapter {name!r}: bias={bias!r} trains biases of the base itself, so no teacher or reference "
                "on it would stay as it is. Use bias='none', or give the trainer another model (or its path) as reference."
            )


@contextmanager
def _speaking(model: PeftModel, adapter: str | None) -> Iterator[None]:
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
