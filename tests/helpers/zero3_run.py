"""One rank of the tests of what ZeRO-3 reads: ``torchrun --nproc_per_node N tests/helpers/zero3_run.py FOLDER``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import transformers.modeling_utils as library
from safetensors.torch import load_file, save_file
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from daekit.errors import UserError
from daekit.models import zero3_loading
from daekit.models.loading import load_model
from daekit.models.restore import restore_weights
from daekit.models.sharded import is_sharded, whole
from daekit.models.zero3_loading import in_own_dtype, without_zero3
from daekit.recipe.schema import ModelSpec
from tests.helpers import tiny

ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
# rows that no number of ranks but one divides; tied; experts, which are fused while they are read
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"vocab_size": 67, "intermediate_size": 61},
    "tied": {"tie_word_embeddings": True},
    "mixtral": {},
}
LARGE = {"hidden": 512, "intermediate_size": 2048, "num_hidden_layers": 12}


def write(folder: Path) -> None:
    """The models, in shards, and one that is large enough to be measured."""
    for name, fields in MODELS.items():
        model = tiny.model("mixtral" if name == "mixtral" else "mistral", seed=3, **fields)
        model.save_pretrained(folder / name, max_shard_size="20KB")
    tiny.model(seed=3, **LARGE).save_pretrained(folder / "large", max_shard_size="20MB")
    lacking = folder / "lacking"
    tiny.model(seed=3).save_pretrained(lacking)
    weights = load_file(lacking / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights | {"lm_head.weight": torch.zeros(3)}, lacking / "model.safetensors", {"format": "pt"})


def peak(load: Any) -> float:
    """Bytes of resident memory above the level before ``load``, at its highest moment; of all ranks the highest."""
    Path("/proc/self/clear_refs").write_text("5")
    level = resident("VmRSS")
    kept = load()
    highest = torch.tensor(resident("VmHWM") - level)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    del kept
    return float(highest)


def resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def same(model: Any, other: Any) -> bool:
    """Whether a split model holds the values of a whole one, and the same ones are tied."""
    names, others = dict(model.named_parameters()), dict(other.named_parameters())
    assert names.keys() == others.keys() and all(map(is_sharded, names.values()))
    assert all(torch.equal(value, other.get_buffer(name)) for name, value in model.named_buffers())
    return all(torch.equal(whole(names[name]), values.detach()) for name, values in others.items())


def main(folder: Path) -> None:
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    wholes = {name: load_model(ModelSpec(path=str(folder / name))) for name in MODELS}
    halves = {name: load_model(ModelSpec(path=str(folder / name), dtype="bfloat16")) for name in MODELS}
    size = sum(p.nbytes for p in load_model(ModelSpec(path=str(folder / "large"))).parameters())
    kept = HfDeepSpeedConfig(ZERO3)  # transformers holds it weakly
    own = library._load_state_dict_into_zero3_model

    def unused(*_: Any) -> Any:
        raise AssertionError("the first rank reads everything")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_load_state_dict_into_zero3_model", unused)
        for name, model in wholes.items():
            split = load_model(ModelSpec(path=str(folder / name)))
            assert same(split, model), name
            with torch.no_grad(), deepspeed.zero.GatheredParameters(list(split.parameters()), modifier_rank=0):
                for parameter in split.parameters():
                    parameter.zero_()
            assert not same(split, model), name
            restore_weights(split, folder / name)
            assert same(split, model), name
            with patch.context() as mixing:
                mixing.setattr(zero3_loading, "mixes_rows", lambda _: True)
                assert same(load_model(ModelSpec(path=str(folder / name))), model), name
            with in_own_dtype():
                assert same(load_model(ModelSpec(path=str(folder / name), dtype="bfloat16")), halves[name]), name
            assert load_model(ModelSpec(path=str(folder / name), dtype="bfloat16")).lm_head.weight.dtype == torch.float32
        with without_zero3():
            assert not any(map(is_sharded, load_model(ModelSpec(path=str(folder / "tied"))).parameters()))
        with pytest.raises(UserError, match=r"1 missing keys such as model\.norm\.weight; 1 mismatched keys such as .*lm_head"):
            load_model(ModelSpec(path=str(folder / "lacking")))
        ours = peak(lambda: load_model(ModelSpec(path=str(folder / "large"))))
    assert library._load_state_dict_into_zero3_model is own
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero3_loading, "can_read_parts", lambda: False)
        theirs = peak(lambda: load_model(ModelSpec(path=str(folder / "large"))))
    # half of it lies there; the largest parameter, in hand, is 4 MB
    assert ours < (1 / dist.get_world_size() + 0.2) * size < theirs, (size, ours, theirs)
    del kept
    unset_hf_deepspeed_config()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if "RANK" in os.environ:
        main(Path(sys.argv[1]))
    else:
        write(Path(sys.argv[1]))
