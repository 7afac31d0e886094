"""Models that wait on the disk until FSDP2 has split them; that they then train as others: test_distributed_engines.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

from daekit.errors import UserError
from daekit.models import split_loading
from daekit.models.adapters import load_continued, reads_base
from daekit.models.loading import load_model
from daekit.models.split_loading import another, waits
from daekit.recipe.schema import ModelSpec
from daekit.trainers import distributed
from daekit.trainers.distributed import reads_parts
from tests.helpers import tiny
from tests.helpers.adapter_world import save_adapter, save_base


def saved(folder: Path, kind: str = "mistral", **fields: Any) -> Path:
    tiny.model(kind, seed=3, **fields).save_pretrained(folder, max_shard_size="20KB")
    return folder


def shapes(model: nn.Module) -> dict[str, Any]:
    return {name: (p.shape, p.dtype) for name, p in model.named_parameters()}


@pytest.mark.parametrize(("kind", "fields"), [("mistral", {"tie_word_embeddings": True}), ("mixtral", {})])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_waiting_model_is_the_model_but_for_its_values(kind: str, fields: Any, dtype: Any, tmp_path: Path) -> None:
    spec = ModelSpec(path=str(saved(tmp_path, kind, **fields)), dtype=dtype)
    whole, state = load_model(spec), torch.get_rng_state()
    waiting = load_model(spec, split=True)
    assert torch.equal(torch.get_rng_state(), state)  # an adapter that is put on it begins with the same values
    assert waits(waiting) and not waits(whole) and waits(another(waiting))
    assert shapes(waiting) == shapes(whole) and not any(p.is_meta for p in waiting.parameters())
    assert all(torch.equal(value, waiting.get_buffer(name)) for name, value in whole.named_buffers())
    assert waiting.config.to_dict() == whole.config.to_dict()


def resident() -> int:
    """Bytes of this process that lie in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def test_a_waiting_model_takes_no_memory(tmp_path: Path) -> None:
    size = dict(hidden=1024, intermediate_size=4096, num_hidden_layers=1)
    with torch.device("meta"):
        meta = tiny.model(**size)
    meta.config.architectures = [type(meta).__name__]
    meta.config.save_pretrained(tmp_path)
    save_file(
        {name: torch.ones(p.shape) for name, p in meta.named_parameters()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    total = sum(p.nbytes for p in meta.parameters())
    assert total > 50e6
    before = resident()
    waiting = load_model(ModelSpec(path=str(tmp_path)), split=True)
    assert resident() - before < 0.1 * total
    assert sum(p.nbytes for p in waiting.parameters()) == total
    before = resident()
    whole = load_model(ModelSpec(path=str(tmp_path)))
    assert sum(float(p.detach().sum()) for p in whole.parameters()) == total / 4 and resident() - before > 0.5 * total


def test_errors_are_said_before_the_model_waits(tmp_path: Path) -> None:
    saved(tmp_path)
    file = next(file for file in tmp_path.glob("*.safetensors") if len(load_file(file)) > 1)
    weights = load_file(file)
    name, lost = weights.popitem()
    spec = ModelSpec(path=str(tmp_path))
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"does not fill the model: 1 missing keys such as {name}"):
        load_model(spec, split=True)
    save_file(weights | {name: lost.new_zeros(3)}, file, {"format": "pt"})
    with pytest.raises(UserError, match="does not fill the model: 1 mismatched keys such as"):
        load_model(spec, split=True)
    file.write_bytes(b"cut off")
    with pytest.raises(UserError, match="could not be loaded"):
        load_model(spec, split=True)


def test_what_is_read_whole_says_why(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def whole(reason: str, **spec: Any) -> None:
        model = load_model(ModelSpec(**spec), split=True)
        assert not waits(model)
        assert f"read whole by each rank ({reason}" in capsys.readouterr().out

    base = saved(tmp_path / "base")
    whole("it is offloaded or has a device_map", path=str(base), offload=True)
    whole("trust_remote_code", path=str(base), trust_remote_code=True)
    whole("its weights are random", config=tiny.model().config.to_dict())
    wide = saved(tmp_path / "wide", hidden=64)
    whole("it is quantised", path=str(wide), quantization="4bit", dtype="float32")
    tied = saved(tmp_path / "tied", tie_word_embeddings=True)
    both = {name: tensor for file in tied.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for file in (*tied.glob("*.safetensors"), *tied.glob("*.index.json")):
        file.unlink()
    save_file(both | {"lm_head.weight": both["model.embed_tokens.weight"] + 1}, tied / "model.safetensors", {"format": "pt"})
    whole("lm_head.weight and model.embed_tokens.weight are one tensor", path=str(tied))
    moe = saved(tmp_path / "moe", "mixtral")
    with monkeypatch.context() as ranks:
        ranks.setattr(torch.distributed, "is_initialized", lambda: True)
        ranks.setattr(torch.distributed, "get_world_size", lambda: 5)  # of 4 experts
        whole("model.layers.0.mlp.experts.gate_up_proj has fewer experts than there are ranks", path=str(moe))
    monkeypatch.setattr(split_loading, "can_read_parts", lambda: False)
    whole("this transformers reads no parts of tensors", path=str(base))


def test_an_adapter_that_is_merged_or_goes_on(tmp_path: Path, capsys: Any) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    assert not waits(load_model(ModelSpec(path=str(adapter)), split=True))
    assert "an adapter is merged into its base" in capsys.readouterr().out
    spec = ModelSpec(adapter=str(adapter))
    waiting, whole = load_continued(spec, split=True), load_continued(spec)
    assert waits(waiting) and not waits(whole)
    learnt = {name: p for name, p in whole.named_parameters() if p.requires_grad}
    assert learnt and all(torch.equal(p, waiting.get_parameter(name)) for name, p in learnt.items())


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"init_lora_weights": "pissa"}, {"trainable_token_indices": [1]}],
)
def test_adapters_that_begin_with_the_base(settings: dict[str, Any]) -> None:
    assert reads_base(LoraConfig(task_type="CAUSAL_LM")) is None
    assert reads_base(LoraConfig(task_type="CAUSAL_LM", **settings))


def test_who_reads_parts(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def args(world: int = 2, **fsdp: Any) -> Any:
        plugin = {"fsdp_version": 2} | fsdp
        return SimpleNamespace(
            fsdp=True, world_size=world, fsdp_plugin_args=plugin, torch_compile=False, chat_template_path=None
        )

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert reads_parts(args()) and reads_parts(args(), student=True)
    assert not reads_parts(args(world=1)) and not capsys.readouterr().out
    dora = LoraConfig(task_type="CAUSAL_LM", use_dora=True)
    assert not reads_parts(args(), student=True, adapter=dora) and "DoRA" in capsys.readouterr().out
    assert reads_parts(args(), student=True, adapter=LoraConfig(task_type="CAUSAL_LM"))
    assert reads_parts(args(activation_checkpointing=True)) and not reads_parts(
        args(activation_checkpointing=True), student=True
    )
    assert "the student: read whole by each rank (fsdp_activation_checkpointing)" in capsys.readouterr().out
    assert not reads_parts(args(cpu_offload=True)) and "teachers: read whole" in capsys.readouterr().out
    monkeypatch.setattr(distributed, "_asks_for_fsdp", lambda _: False)
    assert not reads_parts(args()) and not capsys.readouterr().out
