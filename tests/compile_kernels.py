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

from daekit.losses.kernels import prediction


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
    for name, kernel, types, constants, options in prediction_cases():
        binary = compiled(kernel, types, constants, int(sys.argv[1]) if len(sys.argv) > 1 else 90, options)
        print(json.dumps({"kernel": name, **usage(binary)}), flush=True)
