"""Under ZeRO-3 each rank reads its part of a model, and no more; that models train as before: test_distributed_engines.py."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedModel
from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist, Transpose, WeightConverter, WeightRenaming

from daekit.environment import replaced
from daekit.models.split_loading import mixes_rows
from tests.helpers.ddp_run import ENVIRONMENT, ROOT


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
@pytest.mark.parametrize("ranks", [2, 3])
def test_each_rank_reads_its_part(ranks: int, tmp_path: Path) -> None:
    program = str(ROOT / "tests" / "helpers" / "zero3_run.py")
    environment = ENVIRONMENT | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}  # blocks that are freed are given back
    subprocess.run([sys.executable, program, str(tmp_path)], env=environment, check=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run([*launcher, program, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-6000:]  # asserts there


def test_conversions_that_mix_rows() -> None:
    def mixes(*steps: object) -> bool:
        return mixes_rows(
            SimpleNamespace(weight_mapping=[WeightRenaming("a", "b"), WeightConverter(["c"], ["d"], list(steps))])
        )

    assert not mixes_rows(SimpleNamespace(weight_mapping=None)) and not mixes(MergeModulelist(dim=0), Concatenate(dim=1))
    assert mixes(Concatenate(dim=0)) and mixes(Chunk(dim=0)) and mixes(Transpose(0, 1))


@pytest.mark.parametrize("name", ["get_init_context", "_load_pretrained_model", "tie_weights"])
def test_what_a_library_is_lent_is_set_back_as_it_was(name: str) -> None:
    before = vars(PreTrainedModel)[name]  # a class method, a static method, a method
    with pytest.raises(KeyError), replaced(PreTrainedModel, name, None):
        assert getattr(PreTrainedModel, name) is None
        raise KeyError
    assert vars(PreTrainedModel)[name] is before
