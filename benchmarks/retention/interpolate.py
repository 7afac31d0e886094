"""Weights between a model and its fine-tuned self: an adapter with its product scaled.

    python benchmarks/retention/interpolate.py RUN/stages/expert/model --weights 0.25 0.5 0.75 --out DIR

LoRA adds (alpha / r) B A to a weight W, so W + w (W' - W) is the same adapter with B scaled by w. That is exact where nothing
but A and B is trained.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    """Write one adapter directory for each weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--weights", type=float, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    tensors = load_file(arguments.adapter / "adapter_model.safetensors")
    others = [name for name in tensors if "lora_A" not in name and "lora_B" not in name]
    if others:
        parser.error(f"{arguments.adapter} trains more than A and B: {others[0]}")
    for weight in arguments.weights:
        out = arguments.out / f"{weight:g}"
        shutil.copytree(arguments.adapter, out)
        scaled = {name: tensor * weight if "lora_B" in name else tensor for name, tensor in tensors.items()}
        save_file(scaled, out / "adapter_model.safetensors", metadata={"format": "pt"})
        print(out)


if __name__ == "__main__":
    main()
