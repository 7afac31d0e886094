"""Shared by all tests: tiny models from configs, a tiny tokenizer, rows; nothing is downloaded."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU the Triton kernels are tested in Triton's interpreter. Triton reads this when it is first imported (by TRL
# too), and a worker of pytest-xdist imports all test files: only here is early enough. Nothing else runs Triton on a CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
