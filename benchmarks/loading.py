"""Loading a mixture of experts in 4 or 8 bits: peak memory of the host, bytes per parameter, seconds.

A synthetic Mixtral-type checkpoint is written shard by shard to a temporary folder (deleted afterwards) and loaded in a fresh
process, which measures its peak of *resident* memory above the level after its imports: pages of mapped files count.

    bound = quantised size + 1.5 x the largest shard + 1 GiB

Contestants: ours; ``mapped``, our quantiser with transformers' own way of reading; ``stock``, transformers and bitsandbytes as
they are, which leave experts in 16 bits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from harness import machine_facts
from measure import PeakMemory
from safetensors.torch import save_file

GIB = 2**30
NAMES = ("ours", "mapped", "stock")
LARGE = dict(hidden_size=1536, intermediate_size=5376, num_hidden_layers=16, num_local_experts=8)  # 6.9 GB in bfloat16
SMALL = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=12, num_local_experts=8)


def main() -> None:
    """The command line; ends with status 1 if ours exceeds the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", default=["4bit", "8bit"], choices=["4bit", "8bit"])
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--small", action="store_true", help="a checkpoint of 150 MB: does everything work?")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written for the time being")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--run", nargs=3, metavar=("NAME", "BITS", "PATH"), help="load in this process; prints JSON")
    options = parser.parse_args()
    if options.run:
        print(json.dumps(load(*options.run)))
        return
    options.device, options.dtype, options.repeats = torch.device("cpu"), torch.bfloat16, 1
    facts = machine_facts(options)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        shards = write_checkpoint(folder, SMALL if options.small else LARGE)
        rows = [row(name, bits, folder, shards) | facts for bits in options.bits for name in options.names]
    finally:
        shutil.rmtree(folder)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    sys.exit(0 if all(found["within"] for found in rows if found["name"] == "ours") else 1)


def row(name: str, bits: str, folder: Path, shards: list[int]) -> dict[str, Any]:
    """One contestant in a fresh process."""
    command = [sys.executable, __file__, "--run", name, bits, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    found = json.loads(done.stdout.splitlines()[-1])
    bound = found["model_gib"] + 1.5 * max(shards) / GIB + 1
    found |= {"case": bits, "name": name, "checkpoint_gib": sum(shards) / GIB, "shards": len(shards), "bound_gib": bound}
    found |= {"largest_shard_gib": max(shards) / GIB, "within": found["peak_gib"] <= bound}
    print(
        f"{bits} {name:<7} {found['checkpoint_gib']:.2f} GiB in {len(shards)} shards: peak {found['peak_gib']:.2f} GiB, "
        f"bound {bound:.2f}, model {found['model_gib']:.2f} GiB, {found['expert_bytes']:.3f} bytes per expert parameter, "
        f"{found['seconds']:.0f} s",
        flush=True,
    )
    return found


def load(name: str, bits: str, path: str) -> dict[str, Any]:
    """Load the checkpoint and measure."""
    import bitsandbytes  # noqa: F401
    from transformers import AutoModelForCausalLM, MixtralForCausalLM  # noqa: F401

    from daekit.models import loading
    from daekit.models.experts import QuantisedExperts
    from daekit.models.quantization import quantization_config, require_supported, stored_weights
    from daekit.recipe.schema import ModelSpec

    spec = ModelSpec(path=path, quantization=bits, dtype="bfloat16")  # type: ignore[arg-type]
    config = quantization_config(spec)
    require_supported(config, torch.device("cpu"), path)  # loads the libraries' code
    if name == "mapped":
        from contextlib import nullcontext

        loading.reading_unmapped = nullcontext
    start = time.perf_counter()
    with PeakMemory(torch.device("cpu")) as memory:
        if name == "stock":
            model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16)
        else:
            model = loading.load_model(spec)
    assert memory.megabytes is not None
    experts = [(m.values, sum(p.nbytes for p in m.parameters())) for m in model.modules() if isinstance(m, QuantisedExperts)]
    experts = experts or [(p.numel(), p.nbytes) for n, p in model.named_parameters() if ".experts." in n]
    return {
        "peak_gib": memory.megabytes / 1024,
        "model_gib": sum(weight.bytes for weight in stored_weights(model)) / GIB,
        "expert_bytes": sum(size for _, size in experts) / sum(values for values, _ in experts),
        "seconds": time.perf_counter() - start,
    }


def write_checkpoint(folder: Path, shape: dict[str, int]) -> list[int]:
    """A Mixtral of random weights, one shard per layer and one for the ends, under the names of the hub; sizes in bytes."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        **shape, vocab_size=32000 if shape is LARGE else 1000, num_attention_heads=16, num_key_value_heads=8,
        dtype="bfloat16", architectures=["MixtralForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    H, F, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
    generator = torch.Generator().manual_seed(0)
    names: dict[str, str] = {}
    sizes: list[int] = []

    def write(tensors: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{len(sizes):05d}.safetensors"
        made = {n: torch.randn(s, generator=generator).mul_(0.02).to(torch.bfloat16) for n, s in tensors.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
        names.update(dict.fromkeys(tensors, file))
        sizes.append((folder / file).stat().st_size)

    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        tensors: dict[str, tuple[int, ...]] = {f"{at}.{n}_layernorm.weight": (H,) for n in ("input", "post_attention")}
        tensors |= {f"{at}.self_attn.{n}_proj.weight": (kv if n in "kv" else H, H) for n in "qkvo"}
        tensors[f"{at}.block_sparse_moe.gate.weight"] = (config.num_local_experts, H)
        for expert in range(config.num_local_experts):
            for n, size in (("w1", (F, H)), ("w2", (H, F)), ("w3", (F, H))):
                tensors[f"{at}.block_sparse_moe.experts.{expert}.{n}.weight"] = size
        write(tensors)
    V = config.vocab_size
    write({"model.embed_tokens.weight": (V, H), "lm_head.weight": (V, H), "model.norm.weight": (H,)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return sizes


if __name__ == "__main__":
    main()
