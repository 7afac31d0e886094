"""From a ModelSpec to a model: hub id, directory, adapter on its base, or random weights from a config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.modeling_utils import set_zero3_state
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, find_adapter_config_file

from daekit.environment import rank
from daekit.errors import UserError, first_line, nearest
from daekit.models.hardware import in_one_dtype, require_readable, settings_of
from daekit.models.placement import device_map_of, require_devices
from daekit.models.quantization import (
    bits_of,
    keep_four_bit_weights,
    quantization_config,
    rank_device,
    require_quantised,
    require_supported,
    require_whole_blocks,
)
from daekit.models.quantized_loading import quantising_experts, reading_unmapped
from daekit.models.restore import ALWAYS, restore_adapter
from daekit.models.split_loading import CannotWaitError, waiting_model
from daekit.models.vocabulary import vocabulary_size
from daekit.models.zero3_loading import each_rank_reading
from daekit.recipe.adapter_config import ADAPTER_CONFIG, holds_adapter, read_adapter_config
from daekit.recipe.schema import ModelSpec

# what transformers raises for files that hold something else than it takes for granted, null for instance
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError)


def load_model(
    spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None = None, seed: int = 0, split: bool = False
) -> PreTrainedModel:
    """Load or build the model of ``spec`` (its ``stage`` already resolved to a path).

    Args:
        spec: exactly one of ``path`` and ``config`` is set.
        tokenizer: gives ``vocab_size`` and special tokens to a model built from a config.
        seed: seed of the random weights of a model built from a config.
        split: FSDP2 is about to split it: leave its weights on the disk until then (``split_loading.py``), where that can be.

    Raises:
        UserError: no such directory or hub id, corrupt or incomplete weights, an invalid config, a "4bit" model most of
            whose weights stay in 16 bits.
    """
    if spec.config is not None:
        if split:
            say_whole(f"a {spec.config.get('model_type')} model", "its weights are random, and the same ones on every rank")
        return _from_config(spec, tokenizer, seed)
    assert spec.path is not None, "a recipe's stages are resolved before their models are loaded"
    directory = Path(spec.path).expanduser()
    if holds_adapter(directory):
        if split:
            say_whole(spec.path, "an adapter is merged into its base")
        return _merged_adapter(directory, spec)
    return _from_pretrained(spec, split)


def say_whole(path: object, reason: object) -> None:
    """Tell the user, once per machine, that every rank reads a model whole although it is split."""
    if rank(local=True) == 0:
        print(f"{path}: read whole by each rank ({reason})", flush=True)


def load_whole(load: Callable[..., Any], path: str, arguments: Mapping[str, Any], split: bool = False) -> PreTrainedModel:
    """``load(path, **arguments)``, which is ``from_pretrained`` or takes its arguments; no weight is left to chance.

    With ``split`` its weights stay on the disk until FSDP2 has split it (see ``load_model``). With ``quantization_config`` of
    bitsandbytes experts are quantised, too, while they are read; a checkpoint that was saved in 4 or 8 bits is looked at in the
    same way.

    Raises:
        UserError: no model there, a pickle, unreadable weights, a missing shard, missing weights or weights of another shape; a
            quantisation that this device cannot do, that left most weights as they were, or of weights that are quantised.
    """
    require_shards(Path(path).expanduser())
    revision = arguments.get("revision")
    # transformers would load the base that an adapter names, and run its code on the trust that was given to the adapter
    if arguments.get("trust_remote_code") and find_adapter_config_file(path, revision=revision) is not None:
        raise UserError(
            f"{path}: holds an adapter, and trust_remote_code for it would run the code of the base that it names. Name the "
            "base and give trust_remote_code there, or leave it out."
        )
    config = arguments.get("quantization_config")
    settings = stored_settings(path, revision)
    reason = _why_whole(settings, arguments) if split else "not split"
    if reason is None:
        try:
            return waiting_model(lambda: _read(load, path, arguments))
        except CannotWaitError as error:
            reason = str(error)
    if split:
        say_whole(path, reason)
    if isinstance(config, BitsAndBytesConfig):
        if settings:
            raise UserError(
                f"{path}: its weights are quantised already ({settings.get('quant_method')}), and their own settings would win "
                f"over quantization={bits_of(config)}. Leave quantization out, or give the unquantised model."
            )
        require_supported(config, rank_device(), path)
        with reading_unmapped(), quantising_experts():
            model = _read(load, path, arguments)
    else:
        require_readable(settings, path)
        model = _read(load, path, arguments)
        in_one_dtype(model, settings)
    if isinstance(getattr(model.config, "quantization_config", None), BitsAndBytesConfig):  # ours, or that of the checkpoint
        line = require_quantised(model, path)
        require_whole_blocks(model, path)
        if rank(local=True) == 0:
            print(line, flush=True)
        keep_four_bit_weights(model)
    return model


def _why_whole(settings: Mapping[str, Any], arguments: Mapping[str, Any]) -> str | None:
    """Why a model has to be read whole, as far as arguments of ``from_pretrained`` and its config tell; None: it can wait."""
    if arguments.get("quantization_config") is not None or settings:
        return "it is quantised"
    if arguments.get("device_map") is not None:
        return "it is offloaded or has a device_map"
    return "trust_remote_code" if arguments.get("trust_remote_code") else None


def stored_settings(path: str, revision: str | None) -> dict[str, Any]:
    """How the weights of a model were quantised before they were saved; empty for others, and for no model."""
    try:
        return settings_of(PreTrainedConfig.get_config_dict(path, revision=revision)[0])
    except UNREADABLE:  # whoever loads it says so
        return {}


def _read(load: Callable[..., Any], path: str, arguments: Mapping[str, Any]) -> PreTrainedModel:
    """The model of ``load(path, **arguments)``, filled, or UserError."""
    try:
        with each_rank_reading():
            model, info = load(path, **arguments, **ALWAYS)
    except (UserError, CannotWaitError):
        raise
    except ImportError as error:  # FlashAttention, for instance
        raise UserError(f"{path}: the model could not be loaded ({' '.join(str(error).split())})") from error
    except UNREADABLE as error:
        raise UserError(
            f"{path}{not_here(path)}: the model could not be loaded ({first_line(error)}). "
            "It must be a hub id or a directory with config.json and whole *.safetensors files."
        ) from error
    broken = {what: sorted(map(str, info[what])) for what in ("missing_keys", "mismatched_keys") if info[what]}
    if broken:
        some = "; ".join(f"{len(keys)} {what.replace('_', ' ')} such as {keys[0]}" for what, keys in broken.items())
        raise UserError(f"{path}: the checkpoint does not fill the model: {some}. It is incomplete or of another model.")
    return model


def not_here(path: str) -> str:
    """A part of an error: that the hub was asked for a model because there is no such directory."""
    return "" if Path(path).expanduser().is_dir() else ", which is no directory here"


def require_shards(directory: Path) -> None:
    """Every shard that the index of a local checkpoint names must be a safetensors file in there, otherwise UserError."""
    index = directory / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        elsewhere = [shard for shard in shards if Path(shard).name != shard or not shard.endswith(".safetensors")]
    except UNREADABLE as error:
        raise UserError(f"{index}: the index of the shards cannot be read ({first_line(error)})") from error
    if elsewhere:
        raise UserError(
            f"{index}: names {elsewhere[0]!r}, which is no safetensors file in its own directory. Weights are read from there "
            "only: download the checkpoint again, or convert it."
        )
    missing = [shard for shard in shards if not (directory / shard).is_file()]
    if missing:
        raise UserError(
            f"{directory}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}. Download or copy the checkpoint again."
        )


def load_tokenizer_of(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model of ``spec``; UserError if there is none."""
    assert spec.path is not None
    try:
        return AutoTokenizer.from_pretrained(spec.path, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise UserError(
            f"{spec.path}: no tokenizer could be loaded from it{not_here(spec.path)} ({first_line(error)})"
        ) from error


def _from_config(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> PreTrainedModel:
    fields: dict[str, Any] = dict(spec.config or {})
    model_type = fields.pop("model_type", None)
    if tokenizer is not None:
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
        fields = {"vocab_size": int(vocabulary_size(tokenizer))} | special | fields
    try:
        config = AutoConfig.for_model(model_type, **fields)
        _refuse_unknown(fields, config)
        set_seed(seed)
        dtype = getattr(torch, spec.dtype, torch.float32)  # auto
        attention = {"attn_implementation": spec.attn_implementation} if spec.attn_implementation else {}
        with set_zero3_state():  # the same random weights under every engine; ZeRO-3 splits them when the training begins
            return AutoModelForCausalLM.from_config(config, dtype=dtype, **attention)
    except StrictDataclassError as error:  # says on further lines what is wrong
        raise UserError(f"config of a {model_type} model: {' '.join(str(error).split())}") from error
    except UserError:
        raise
    except (ImportError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"config of a {model_type} model: {first_line(error)}") from error


def _refuse_unknown(fields: dict[str, Any], config: PreTrainedConfig) -> None:
    """transformers keeps a key that it does not know as an attribute, where nothing reads it."""
    default = type(config)()
    for key in fields:
        if hasattr(config, key) and not hasattr(default, key):
            hint = nearest(key, default.to_dict())
            raise UserError(f"config of a {config.model_type} model: {key}={fields[key]!r} is not a field of it{hint}")


def _from_pretrained(spec: ModelSpec, split: bool) -> PreTrainedModel:
    arguments: dict[str, Any] = {name: getattr(spec, name) for name in ("dtype", "revision", "trust_remote_code")}
    if spec.attn_implementation:
        arguments["attn_implementation"] = spec.attn_implementation
    if spec.quantization:
        arguments["quantization_config"] = quantization_config(spec)
        arguments["device_map"] = {"": rank_device()}
    if spec.offload:  # to the host; the teacher brings its layers to the device
        arguments["device_map"] = {"": "cpu"}
    if spec.device_map is not None:
        require_devices(spec.device_map, str(spec.path))
        arguments["device_map"] = device_map_of(spec.device_map)
    model = load_whole(AutoModelForCausalLM.from_pretrained, str(spec.path), arguments, split)
    if "disk" in (getattr(model, "hf_device_map", None) or {}).values():
        raise UserError(
            f"{spec.path}: device_map={spec.device_map} leaves some of it on the disk, as it does not fit in memory. "
            "Quantize it (quantization: 4bit), or give it more devices."
        )
    return model


def _merged_adapter(directory: Path, spec: ModelSpec) -> PreTrainedModel:
    """A LoRA adapter folded into its base, which may be an adapter in turn, without quantisation."""
    if spec.quantization:
        raise UserError(
            f"{directory}: holds a LoRA adapter, which is merged into its 16-bit base; quantization={spec.quantization} "
            "is not possible then. Merge it first and load the merged model in 4 bits."
        )
    return merge_adapter(load_model(base_of_adapter(spec, directory)), directory)


def base_of_adapter(spec: ModelSpec, directory: str | Path) -> ModelSpec:
    """The base that the adapter in a directory names, loaded as ``spec`` says."""
    config = adapter_config(directory)
    # code of a base that the recipe does not name is not trusted
    base = {"path": config.base_model_name_or_path, "revision": config.revision, "trust_remote_code": False}
    return spec.model_copy(update={"adapter": None, **base})


def merge_adapter(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """``model`` with the LoRA adapter of ``directory`` folded in; what was trained of it before is trained now.

    Raises:
        UserError: no adapter there, one that cannot be read, or one that does not fit the model.
    """
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    merged: Any = with_adapter(model, directory).merge_and_unload()
    for name, parameter in merged.named_parameters():  # PEFT has frozen them all
        parameter.requires_grad_(trained[name])
    # the next adapter trained on it must name this as its base, not the base without this adapter
    merged.name_or_path = merged.config.name_or_path = str(directory.resolve())
    return merged


def with_adapter(model: PreTrainedModel, directory: Path) -> PeftModel:
    """``model`` with the LoRA adapter of ``directory`` on it, also one of a kind that cannot share its base with others.

    Raises:
        UserError: as ``merge_adapter``.
    """
    # not PeftModel.from_pretrained: it reads pickles, and a missing weight is a warning only
    try:
        adapted = get_peft_model(model, adapter_config(directory))
    except ValueError as error:
        raise UserError(f"{directory}: the adapter does not fit the model ({first_line(error)})") from error
    restore_adapter(adapted, directory, adapted.active_adapter)
    return adapted


def adapter_config(directory: str | Path) -> LoraConfig:
    """The config of the LoRA adapter in a directory; UserError for what ``read_adapter_config`` refuses."""
    read_adapter_config(directory)
    try:
        return LoraConfig.from_pretrained(str(Path(directory).expanduser()))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{directory}: its {ADAPTER_CONFIG} cannot be read ({first_line(error)})") from error
