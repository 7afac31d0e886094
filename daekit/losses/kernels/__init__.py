"""The losses' inner loops as Triton kernels, for CUDA. Importing this package asks for triton; ``daekit.losses`` does not.

Each kernel has a plain twin in ``tests/helpers/kernel_twins.py``. With ``TRITON_INTERPRET=1`` in the environment before
triton is imported they run on CPU tensors: slowly, and only for tests.
"""

from importlib.util import find_spec

from daekit.errors import UserError

if find_spec("triton") is None:
    raise UserError(
        "the losses on CUDA need triton, which is not installed: it comes with torch's CUDA builds on Linux; "
        "elsewhere `pip install triton`"
    )
