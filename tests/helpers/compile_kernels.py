"""Compiles the kernels for an NVIDIA GPU without one; prints a line of JSON per kernel with what ptxas says of it.

``python -m tests.helpers.compile_kernels [ARCH]``, 90 (Hopper) unless given; not with ``TRITON_INTERPRET``. Numbers are those
of the machine code: registers and bytes of stack (spills) per thread, bytes of shared memory per program.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from daekit.losses import DIVERGENCES
from daekit.losses.kernels import attention, prediction

Case = tuple[str, Any, str, dict[str, Any]]  # name, kernel, dtype of its matrices, constants and launch options


def prediction_cases() -> Iterator[Case]:
    for dtype in ("bf16", "fp32"):
        for divergence in DIVERGENCES:
            for full in (True, False):
                constants = dict(TEACHER=True, DIVERGENCE=divergence, TEMPERED=full, SOFTCAP=full, GRADIENT=True, CE=full)
                name = f"{divergence} {dtype}{' tempered capped ce' if full else ''}"
                yield name, prediction._chunk_kernel, dtype, constants | {"BLOCK": 4096, "num_warps": 16}


def attention_cases(roomy: bool) -> Iterator[Case]:
    yield "attending", attention._attending_kernel, "bf16", dict(OUTER=128, STEP=1024)
    shapes = [("bf16", 128, 128), ("bf16", 64, 128), ("bf16", 80, 96), ("fp16", 128, 128), ("bf16", 256, 256)]
    for dtype, width_s, width_t in [*shapes, ("fp32", 128, 128), ("fp32", 256, 256)]:
        query_tiles, key_tiles = attention._tiles(max(width_s, width_t), 4 if dtype == "fp32" else 2, roomy)
        constants = dict(GROUP_S=4, GROUP_T=8, D_S=width_s, D_T=width_t)
        constants |= dict(PAD_S=attention._padded(width_s), PAD_T=attention._padded(width_t))
        shape = f"{dtype} {width_s} {width_t}"
        yield f"value {shape}", attention._query_kernel, dtype, constants | query_tiles | {"GRADIENT": False}
        yield f"value and query {shape}", attention._query_kernel, dtype, constants | query_tiles | {"GRADIENT": True}
        yield f"key {shape}", attention._key_kernel, dtype, constants | key_tiles


def type_of(argument: str, dtype: str) -> str:
    """As the launcher would find it."""
    if argument in ("labels_ptr", "blocks_ptr", "offset_ptr"):
        return "*i64"
    if argument == "correct_ptr":
        return "*u8"
    if argument.endswith("_ptr"):
        return "*fp32" if argument.startswith(("ce_", "divergence_", "kl_", "lse_")) else f"*{dtype}"
    return "i32" if "stride" in argument or argument in ("window_s", "window_t", "heads", "columns") else "fp32"


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], arch: int) -> Any:
    """The kernel as the launcher would compile it: pointers and strides are multiples of 16."""
    names = kernel.arg_names
    options = {"enable_fp_fusion": True} | {key: value for key, value in constants.items() if key not in names}
    constants = {key: value for key, value in constants.items() if key in names}
    signature = {name: "constexpr" if name in constants else type_of(name, dtype) for name in names}
    aligned = [index for index, name in enumerate(names) if name.endswith("_ptr") or "stride" in name]
    attributes = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def usage(binary: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": binary.metadata.shared}


if __name__ == "__main__":
    arch = int(sys.argv[1]) if len(sys.argv) > 1 else 90
    for name, kernel, dtype, constants in [*attention_cases(arch // 10 in (9, 10)), *prediction_cases()]:
        print(json.dumps({"kernel": name, **usage(compiled(kernel, dtype, constants, arch))}), flush=True)
