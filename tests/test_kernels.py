"""The package of Triton kernels: imported when it is needed, and compiled for cards that are not here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_the_losses_do_not_import_triton() -> None:
    code = "import sys, daekit.losses; print(not {'triton', 'daekit.losses.kernels'} & sys.modules.keys())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"


def test_the_kernels_say_when_triton_is_missing() -> None:
    code = "import importlib.util as u; u.find_spec = lambda name: None\nimport daekit.losses.kernels"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: the losses on CUDA need triton, which is not installed" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "shared"), [(90, 227), (80, 163), (89, 99)])
def test_the_kernels_compile_without_a_gpu(arch: int, shared: int) -> None:
    """For data-centre and consumer cards: into their shared memory (KiB), and half precision with hardly a spilled register."""
    command = [sys.executable, "-m", "tests.helpers.compile_kernels", str(arch)]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "0"})
    assert result.returncode == 0, result.stderr
    kernels = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(kernels) == 46
    assert not [kernel for kernel in kernels if kernel["shared"] > shared * 1024]
    assert not [kernel for kernel in kernels if kernel["stack"] > 64 and not re.search("256|fp32", kernel["kernel"])]
