"""Compiles the kernels for an NVIDIA GPU without one; prints a line of JSON per kernel with what ptxas says of it.

``python -m tests.compile_kernels [ARCH]``, ARCH 90 (Hopper) unless given. Run outside the interpreter's mode. Numbers are those
of the machine code: registers and bytes of local memory (spills) per thread, bytes of shared memory per program.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from daekit.losses.kernels import attention, prediction


def prediction_cases() -> Iterator[tuple]:
    """(name, kernel, types of the arguments, constants, options)"""
    for dtype in ("bf16", "fp32"):
        for divergence in prediction.DIVERGENCES:
            for full in (True, False):
                types = {name: "i32" for name in ("student_stride", "teacher_stride", "columns")}
                types |= {"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}", "labels_ptr": "*i64", "correct_ptr": "*u8"}
                types |= {"ce_ptr": "*fp32", "divergence_ptr": "*fp32"}
                constants = dict(TEACHER=True, DIVERGENCE=divergence, TEMPERED=full, SOFTCAP=full, GRADIENT=True, CE=full)
                constants["BLOCK"] = 4096
                name = f"{divergence} {dtype}{' tempered capped ce' if full else ''}"
                yield name, prediction._chunk_kernel, types, constants, {"num_warps": 16}


def attention_cases() -> Iterator[tuple]:
    """(name, kernel, types of the arguments, constants, options)"""
    shapes = [("bf16", 128, 128), ("bf16", 64, 128), ("bf16", 80, 96), ("fp16", 128, 128), ("bf16", 256, 256)]
    for dtype, width_s, width_t in [*shapes, ("fp32", 128, 128), ("fp32", 256, 256)]:
        outer, inner, warps, stages = attention._tiles(max(width_s, width_t), 4 if dtype == "fp32" else 2)
        constants = dict(GROUP_S=4, GROUP_T=8, D_S=width_s, D_T=width_t, OUTER=outer, INNER=inner)
        constants |= dict(PAD_S=attention._padded(width_s), PAD_T=attention._padded(width_t))
        options = {"num_warps": warps, "num_stages": stages}
        for title, kernel, more in [
            ("value", attention._query_kernel, {"GRADIENT": False}),
            ("value and query", attention._query_kernel, {"GRADIENT": True}),
            ("key", attention._key_kernel, {}),
        ]:
            types = {name: "i32" for name in kernel.arg_names if "stride" in name or "window" in name or name == "heads"}
            types |= {f"{name}_{who}_ptr": f"*{dtype}" for name in ("query", "key") for who in "st"}
            types |= {"grad_ptr": f"*{dtype}", "blocks_ptr": "*i64", "offset_ptr": "*i64"}
            types |= {name: "*fp32" for name in ("kl_ptr", "lse_s_ptr", "lse_t_ptr")}
            types = {name: kind for name, kind in types.items() if name in kernel.arg_names}
            yield f"attention {title} {dtype} {width_s} {width_t}", kernel, types, constants | more, options


def compiled(kernel: triton.JITFunction, types: dict[str, str], constants: dict[str, object], arch: int, options: dict) -> object:
    """The kernel as the launcher would compile it: pointers, and strides called so, are multiples of 16."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in names}
    aligned = [name for name in names if signature[name].startswith("*") or (name in types and "stride" in name)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"enable_fp_fusion": True, **options})


def usage(binary: object) -> dict[str, int]:
    """Registers and spilled bytes per thread, shared bytes per program."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]), "shared": binary.metadata.shared}


if __name__ == "__main__":
    for name, kernel, types, constants, options in [*attention_cases(), *prediction_cases()]:
        binary = compiled(kernel, types, constants, int(sys.argv[1]) if len(sys.argv) > 1 else 90, options)
        print(json.dumps({"kernel": name, **usage(binary)}), flush=True)
