"""LoRA adapters from their directories onto a base that is loaded once, compared with it before its weights are read."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from daekit.errors import UserError, first_line
from daekit.models.backbone import base_of
from daekit.models.experts import PROJECTIONS, is_experts_layer
from daekit.models.loading import UNREADABLE, adapter_config, base_of_adapter, load_model, say_whole
from daekit.models.restore import ADAPTER_WEIGHTS, restore_adapter
from daekit.recipe.adapter_config import holds_adapter, on_an_end, read_adapter_config, require_same_base, require_shareable
from daekit.recipe.schema import LoraSpec, ModelSpec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


def lora_config(spec: LoraSpec, base: ModelSpec | None = None) -> LoraConfig:
    """A new adapter, on ``base``, in PEFT's terms, which are those of the spec."""
    options = spec.model_dump(mode="json", exclude={"merge"})
    return LoraConfig(task_type="CAUSAL_LM", revision=base.revision if base else None, **options)


def base_spec(spec: ModelSpec) -> ModelSpec:
    """The base of a student that continues an adapter: what ``spec`` names (UserError if not the adapter's), or the adapter."""
    if spec.adapter is None:
        return spec
    if spec.path is None:
        return base_of_adapter(spec, spec.adapter)
    config = adapter_config(spec.adapter)
    require_same_base(spec.adapter, str(config.base_model_name_or_path), spec.path, (config.revision, spec.revision))
    return spec.model_copy(update={"adapter": None})


def tokenizer_spec(spec: ModelSpec) -> ModelSpec:
    """Where the tokenizer of a model lies: beside its adapter if there is one, else beside the base, or the base of that."""
    if spec.adapter is not None:
        return ModelSpec(path=spec.adapter) if holds_tokenizer(spec.adapter) else tokenizer_spec(base_spec(spec))
    if spec.path is not None and holds_adapter(spec.path) and not holds_tokenizer(spec.path):
        return tokenizer_spec(base_of_adapter(spec, spec.path))
    return spec


def holds_tokenizer(directory: str | Path) -> bool:
    """Whether a tokenizer lies in a directory; published ones may lack ``tokenizer_config.json``."""
    return any((Path(directory).expanduser() / name).is_file() for name in _TOKENIZER_FILES)


def load_continued(spec: ModelSpec, split: bool = False) -> PeftModel:
    """A student that goes on with the adapter ``spec.adapter``, trainable, on its base in the quantisation of ``spec``.

    ``split`` as in ``load_model``.

    Raises:
        UserError: before the base is loaded: an adapter of another base, incomplete, or of a kind that is not supported; then
            what ``load_model`` refuses.
    """
    assert spec.adapter is not None
    base = base_spec(spec)
    require_adapters_fit([spec.adapter], base)
    config = adapter_config(spec.adapter)
    config.inference_mode = False
    config.revision = base.revision
    config = _without_first_values(config)
    if split and (reason := reads_base(config)):
        say_whole(base.path, reason)
        split = False
    model = get_peft_model(load_model(base, split=split), config)
    restore_adapter(model, Path(spec.adapter).expanduser(), "default")
    return model


def reads_base(config: PeftConfig) -> str | None:
    """What of a new adapter is made of its base's weights, so that they have to be there; None: nothing."""
    if not isinstance(config, LoraConfig):
        return f"an adapter of type {config.peft_type}"
    if config.modules_to_save or config.trainable_token_indices:
        return "its adapter holds a copy of some of its weights"
    if config.use_dora or config.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        return "its adapter begins with its weights (DoRA, init_lora_weights)"
    return None


def load_frozen(model: PeftModel, folder: str | Path, name: str) -> None:
    """Add the adapter in ``folder`` to a PEFT model, frozen; the active one stays active.

    On a quantised base it runs in the dtype it was saved in (TRL trains adapters in bfloat16 there), otherwise in float32, as
    PEFT has it, so that it is the merged model.

    Raises:
        UserError: an adapter of another base, incomplete, of other shapes, or of a kind that is not supported.
    """
    config = adapter_config(folder)
    config.inference_mode = True
    base = base_of(model)
    revisions = config.revision, model.peft_config[model.active_adapter].revision
    require_same_base(folder, str(config.base_model_name_or_path), base.config._name_or_path or "", revisions)
    with torch.device("meta"):
        meta_model = type(base)(copy.deepcopy(base.config))
    quantised = getattr(base, "is_quantized", False)
    _require_fits(folder, config, meta_model, quantised)
    flags = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.add_adapter(name, _without_first_values(config))
    restore_adapter(model, Path(folder).expanduser(), name, saved_dtypes=quantised)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(flags.get(key, False))


def require_adapters_fit(folders: Iterable[str | Path], base: ModelSpec) -> None:
    """Compare adapters with the base that they shall run on, before its weights are loaded; see ``load_frozen``."""
    assert base.path is not None, "a base has a name"
    config = config_of(base)
    for folder in folders:
        lora = adapter_config(folder)
        require_same_base(folder, str(lora.base_model_name_or_path), base.path, (lora.revision, base.revision))
        # trust in an adapter is none in the base that it names, whose config this is
        trusted = base.trust_remote_code and not holds_adapter(str(base.path))
        with torch.device("meta"):
            meta_model = AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)
        _require_fits(folder, lora, meta_model, quantised=base.quantization is not None)


def require_targets(model: PreTrainedModel, config: LoraConfig) -> None:
    """Try a new adapter on a twin of a model without weights: PEFT's refusals as one sentence.

    Raises:
        UserError: no such module, modules that PEFT refuses (of state-space layers), routers that return several tensors, to
            which an adapter's output cannot be added.
    """
    with torch.device("meta"):
        try:
            adapted = get_peft_model(type(model)(copy.deepcopy(model.config)), _without_first_values(config))
        except ValueError as error:
            reason = first_line(error).split(". ")[0]
            raise UserError(
                f"peft_config: target_modules={config.target_modules!r} does not fit {model.config.model_type} ({reason}). "
                "Name modules, such as q_proj and v_proj."
            ) from error
    for name, layer in adapted.named_modules():
        linear = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) and not isinstance(layer, ParamWrapper) else None
        # a Linear that a family has made something else of
        if isinstance(linear, nn.Linear) and type(linear).__module__.startswith("transformers.models."):
            raise UserError(
                f"peft_config: target_modules={config.target_modules!r} takes in {name.removeprefix('base_model.model.')}, a "
                f"{type(linear).__name__}, which returns several tensors. Name modules, such as q_proj and v_proj."
            )


def _require_fits(folder: str | Path, lora: LoraConfig, meta_model: PreTrainedModel, quantised: bool) -> None:
    """Compare names and shapes of an adapter's tensors with its base as a model without weights, which is used up.

    ``quantised``: the base itself is, or will be, in 4 or 8 bits.

    Raises:
        UserError: an adapter that cannot share its base; matrices on experts that are quantised; missing or left-over tensors,
            other shapes, no module that it could sit on; a module saved whole that the output head is tied to.
    """
    require_shareable(folder, read_adapter_config(folder))
    with torch.device("meta"):
        try:
            adapted = get_peft_model(meta_model, _without_first_values(lora))
        except ValueError as error:
            raise UserError(f"{folder}: the adapter does not fit the base ({str(error).splitlines()[0]})") from error
    wrappers = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    if quantised and any(w.parameter_name in PROJECTIONS and is_experts_layer(w.get_base_layer()) for w in wrappers):
        raise UserError(
            f"{folder}: the adapter carries LoRA matrices on experts ({', '.join(lora.target_parameters or ())}), which are "
            "quantised in this base: an adapter on them is not supported. Load the base without quantization, or use an "
            "adapter without them."
        )
    ends = {"the output head": adapted.get_output_embeddings(), "the embeddings": adapted.get_input_embeddings()}
    for end, module in ends.items():
        if isinstance(module, BaseTunerLayer):
            raise on_an_end(folder, end)
        if isinstance(module, AuxiliaryTrainingWrapper) and meta_model.config.get_text_config().tie_word_embeddings:
            raise UserError(
                f"{folder}: the adapter holds {end} of its own (modules_to_save or trainable_token_indices), but this base "
                "ties embeddings and output head: the other one would not follow. Use an adapter without them."
            )
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    saved = _saved_shapes(folder)
    if different := sorted({name for name, _ in expected.items() ^ saved.items()}):
        first = different[0]
        raise UserError(
            f"{folder}: its weights do not fit the base: {len(different)} tensors differ, such as {first} (saved: "
            f"{saved.get(first, 'nothing')}, the base wants: {expected.get(first, 'nothing')}). The adapter is incomplete or "
            "of another base."
        )


def config_of(base: ModelSpec) -> PreTrainedConfig:
    """The config of a base; of one that is an adapter merged when it is loaded, that of the model below."""
    assert base.path is not None
    if holds_adapter(base.path):
        return config_of(base_of_adapter(base, base.path))
    try:
        return AutoConfig.from_pretrained(base.path, revision=base.revision, trust_remote_code=base.trust_remote_code)
    except UNREADABLE as error:
        raise UserError(f"{base.path}: the config of the model could not be read ({first_line(error)})") from error


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


def _without_first_values(config: LoraConfig) -> LoraConfig:
    """A copy whose first values are PEFT's usual ones: they are written over, and ``eva`` would want data for its own."""
    config = copy.deepcopy(config)
    config.init_lora_weights = True
    return config


def _saved_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    path = Path(folder).expanduser() / ADAPTER_WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: the weights of the LoRA adapter cannot be read ({error})") from error
