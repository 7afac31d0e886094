"""What an adapter's directory says of it, read before any weight: is it plain LoRA, and of which base?"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from daekit.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
_HIGHEST_RANK = 2**16
BARE_BASE = "base"  # as an ``adapter``: the student's base with its adapter off
STAGE = "stage:"
_KEEP_THE_BASE = (True, False, "gaussian", "eva", "orthogonal")  # first values that leave the weights of the base as they are


def holds_adapter(folder: str | Path) -> bool:
    """Whether a directory is one that PEFT saved an adapter in."""
    return os.path.isfile(os.path.join(os.path.expanduser(folder), ADAPTER_CONFIG))


def adapter_stage(adapter: str | None) -> str | None:
    """NAME of ``stage:NAME``; None for anything else."""
    return adapter.removeprefix(STAGE).strip() if adapter is not None and adapter.startswith(STAGE) else None


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The content of ``adapter_config.json``.

    Raises:
        UserError: not a directory with an adapter, not LoRA, no rank that a LoRA adapter could have, no base named, or a base
            that leads back to the adapter.
    """
    return _read(folder, set())


def _read(folder: str | Path, above: set[str]) -> dict[str, Any]:
    """``above``: the directories of the adapters that this one is a base of."""
    try:
        with open(os.path.join(os.path.expanduser(folder), ADAPTER_CONFIG), encoding="utf-8") as file:
            config = json.load(file)
    except OSError as error:
        raise UserError(
            f"{folder}: is no directory with a LoRA adapter ({ADAPTER_CONFIG} cannot be read: {error.strerror}); give the "
            "directory that PEFT or an earlier run has saved it in"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: its {ADAPTER_CONFIG} cannot be read ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{folder}: holds an adapter of the kind {kind}; only LoRA adapters are supported")
    pattern = config.get("rank_pattern") or {}
    for rank in (config.get("r", 8), *(pattern.values() if isinstance(pattern, dict) else [pattern])):
        if not isinstance(rank, int) or not 1 <= rank <= _HIGHEST_RANK:
            raise UserError(f"{folder}: its {ADAPTER_CONFIG} has r={rank!r}; a rank lies between 1 and {_HIGHEST_RANK}")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        raise UserError(f"{folder}: its {ADAPTER_CONFIG} names no base model (base_model_name_or_path) to compare with")
    if not isinstance(revision, str | None) or not isinstance(config.get("target_modules"), str | list | None):
        raise UserError(f"{folder}: its {ADAPTER_CONFIG} has a revision or target_modules of another kind than PEFT writes")
    above = {*above, os.path.realpath(os.path.expanduser(folder))}
    below = os.path.realpath(os.path.expanduser(base))
    if holds_adapter(below):
        if below in above:
            raise UserError(
                f"{folder}: its {ADAPTER_CONFIG} names the base {base!r}, which leads back to the adapter itself: write there "
                "the model that it was trained on (base_model_name_or_path)"
            )
        _read(below, above)
    return config


def require_shareable(folder: str | Path, config: dict[str, Any]) -> None:
    """Refuse an adapter that cannot run on a base which others share.

    Raises:
        UserError: it changes weights of the base itself, or carries LoRA matrices on the output head or on the embeddings.
    """
    merged = "merge it (daekit merge) and give the merged model"
    if config.get("bias", "none") != "none":
        raise UserError(f"{folder}: bias={config['bias']!r} changes biases of the base itself, which others share; {merged}")
    if config.get("init_lora_weights", True) not in _KEEP_THE_BASE:
        raise UserError(
            f"{folder}: init_lora_weights={config['init_lora_weights']!r} has changed the weights of the base that it was "
            f"trained on, which others share; {merged}, or convert it (path_initial_model_for_weight_conversion of PEFT)"
        )
    targets = config.get("target_modules") or []
    ends = [name for name in ("lm_head", "embed_tokens") if not isinstance(targets, str) and name in targets]
    if ends:
        raise on_an_end(folder, ends[0])


def on_an_end(folder: str | Path, end: str) -> UserError:
    """The error for LoRA matrices where the model begins or ends."""
    return UserError(
        f"{folder}: the adapter carries LoRA matrices on {end}, where a loss on hidden states and the output head's own weight "
        "would ignore them. Merge it into its base (daekit merge) and give the merged model, or train it without."
    )


def same_base(one: str, other: str) -> bool:
    """Whether two names are of one model: the same hub id, or the same directory by whatever path."""
    if one == other:
        return True
    first, second = os.path.expanduser(one), os.path.expanduser(other)
    return os.path.isdir(first) and os.path.isdir(second) and os.path.realpath(first) == os.path.realpath(second)


def require_same_base(folder: str | Path, adapter_base: str, base: str, revisions: tuple[str | None, str | None]) -> None:
    """Compare the base that an adapter names with the one it shall run on.

    Args:
        folder: directory that holds the adapter.
        adapter_base: the base that it names.
        base: the student's.
        revisions: revisions of the adapter's base and of ``base``; one that is not known (None) is not compared.

    Raises:
        UserError: another name or another revision.
    """
    theirs, ours = revisions
    if not base:
        raise UserError(
            f"{folder}: is an adapter of {adapter_base!r}; the student's base has no name to compare with, for it was not "
            "loaded from a directory or hub id. Load it from there."
        )
    if not same_base(adapter_base, base):
        raise UserError(
            f"{folder}: is an adapter of {adapter_base!r}, not of the student's base {base!r}. Choose one of this base, or, if "
            f"both names mean one model, correct base_model_name_or_path in its {ADAPTER_CONFIG}."
        )
    if theirs is not None and ours is not None and theirs != ours:
        raise UserError(f"{folder}: is an adapter of revision {theirs!r} of {base!r}; the student's base is revision {ours!r}")
