"""Where the models of a recipe lie: what cannot be a place, and what excludes what."""

from __future__ import annotations

import re

from daekit.recipe.problems import Problems, listed
from daekit.recipe.schema import ModelSpec
from daekit.recipe.tree import Path

# What takes a place of `device_map`; torch is not imported here to be asked.
_DEVICE = re.compile(r"^(cpu|\d+|(cuda|xpu|npu|hpu|mps)(:\d+)?)$")
_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_placement(model: ModelSpec, path: Path, student: bool, problems: Problems) -> None:
    """Where a teacher lies; a student lies where it is trained."""
    where = (*path, "device_map")
    for key in ("device_map", "offload"):
        if student and getattr(model, key):
            message = "belongs to a teacher; a student is trained on the devices that `accelerate launch` gives it"
            problems.add_check((*path, key), message)
    if model.offload and model.device_map is not None:
        problems.add_check((*path, "offload"), "excludes device_map: it brings the layers to the student's device")
    if model.offload and model.quantization == "8bit":
        message = "does not work with quantization: 8bit, whose weights bitsandbytes keeps out of reach; use 4bit or none"
        problems.add_check((*path, "offload"), message)
    if model.device_map is None:
        return
    if model.config is not None:
        problems.add_check(where, "a model made from a config is made where the student is; remove it")
    if not model.device_map:
        problems.add_check(where, "must not be empty; leave it out for the student's device")
    spread = isinstance(model.device_map, str) and model.device_map in _SPREADS
    devices = list(model.device_map.values()) if isinstance(model.device_map, dict) else [model.device_map]
    wrong = [device for device in devices if device and not spread and not _DEVICE.match(device)]
    if "disk" in wrong:
        message = "disk is not supported: the loss needs weights that are there; use `offload: true` or quantization"
        problems.add_check(where, message)
    elif wrong:
        problems.add_check(where, f"{wrong[0]!r} is no device (cpu, cuda:0, 0...), nor, for a whole model, {listed(_SPREADS)}")
