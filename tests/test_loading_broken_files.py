"""Files of a model that hold something else than they should: one sentence, no code, nothing read from elsewhere."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from daekit.errors import UserError
from daekit.models.adapters import base_spec, load_continued, require_adapters_fit
from daekit.models.loading import load_model, load_tokenizer_of, load_whole
from daekit.recipe.adapter_config import read_adapter_config
from daekit.recipe.schema import ModelSpec
from tests.helpers import tiny

INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", "generation_config.json", INDEX)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in shards, with its tokenizer."""
    folder = tmp_path_factory.mktemp("sharded") / "model"
    tiny.model(seed=1).save_pretrained(folder, max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "content", ["null", "3", "[" * 100_000, '{"weight_map": null}', '{"weight_map": {"a": null}}'], ids=len
)
def test_no_traceback(content: str, sharded: Path, tmp_path: Path) -> None:
    """What transformers takes no notice of may pass."""
    for file in (*MODEL_FILES, *TOKENIZER_FILES):
        folder = tmp_path / file
        shutil.copytree(sharded, folder)
        (folder / file).write_text(content)
        load: Any = load_model if file in MODEL_FILES else load_tokenizer_of
        try:
            load(ModelSpec(path=str(folder)))
        except UserError as error:
            assert str(folder) in str(error)
        else:
            assert content.startswith("{") and file not in (INDEX, "tokenizer.json")


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/hostname", "sub/a.safetensors", "pytorch_model.bin", "..", ""])
def test_an_index_names_safetensors_files_beside_it_only(name: str, sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    index = json.loads((folder / INDEX).read_text())
    weight, shard = next(iter(index["weight_map"].items()))
    for target in (tmp_path / "other.safetensors", folder / "sub" / "a.safetensors"):  # they are there, and hold the weights
        target.parent.mkdir(exist_ok=True)
        shutil.copy(folder / shard, target)
    torch.save({}, folder / "pytorch_model.bin")
    load_model(ModelSpec(path=str(folder)))
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | {weight: name}}))
    with pytest.raises(UserError, match="no safetensors file in its own directory"):
        load_model(ModelSpec(path=str(folder)))


# ---- adapters ---------------------------------------------------------------------------------------------------------------


def adapter(folder: Path, base: Path, **changes: Any) -> Path:
    """An adapter of a base, whose config is then changed."""
    get_peft_model(tiny.model(seed=1), LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])).save_pretrained(
        folder
    )
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)} | changes))
    return folder


def test_an_adapter_that_is_its_own_base(sharded: Path, tmp_path: Path) -> None:
    first = adapter(tmp_path / "first", tmp_path / "first")
    adapter(tmp_path / "second", tmp_path / "third")
    adapter(tmp_path / "third", tmp_path / "x" / ".." / "second")
    (tmp_path / "x").mkdir()
    for folder in (first, tmp_path / "second"):
        for load in (load_model, load_continued):
            spec = ModelSpec(path=str(folder)) if load is load_model else ModelSpec(adapter=str(folder))
            with pytest.raises(UserError, match="leads back to the adapter itself"):
                load(spec)
    whole = adapter(tmp_path / "upper", adapter(tmp_path / "lower", sharded))
    assert read_adapter_config(whole)["r"] == 2


@pytest.mark.parametrize(
    "changes", [{"r": 1e9}, {"r": 10**9}, {"r": 0}, {"r": None}, {"rank_pattern": {"q_proj": 10**9}}], ids=str
)
def test_a_rank_that_no_adapter_has(changes: dict[str, Any], sharded: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", sharded, **changes)
    for spec in (ModelSpec(path=str(folder)), ModelSpec(adapter=str(folder))):
        with pytest.raises(UserError, match="a rank lies between"):
            load_model(spec) if spec.path else load_continued(spec)


# ---- code of others ---------------------------------------------------------------------------------------------------------


def with_code(base: Path, to: Path, marker: Path) -> Path:
    """A copy of a model whose config names a class in a file of its own, which leaves a mark when it runs."""
    shutil.copytree(base, to)
    (to / "evil.py").write_text(
        f"from transformers import MistralConfig, MistralForCausalLM\nopen({str(marker)!r}, 'w').close()\n"
        "class C(MistralConfig):\n    pass\nclass M(MistralForCausalLM):\n    config_class = C\n"
    )
    config = json.loads((to / "config.json").read_text())
    names = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    (to / "config.json").write_text(json.dumps(config | {"auto_map": names}))
    return to


def test_trust_in_an_adapter_is_no_trust_in_its_base(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "it ran"
    base = with_code(sharded, tmp_path / "base", marker)
    lower = adapter(tmp_path / "lower", base)
    upper = adapter(tmp_path / "upper", lower)
    trusting = ModelSpec(path=str(lower), trust_remote_code=True)
    for use in (
        lambda: load_model(trusting),
        lambda: load_model(ModelSpec(path=str(upper), trust_remote_code=True)),
        lambda: load_continued(ModelSpec(adapter=str(lower), trust_remote_code=True)),
        lambda: require_adapters_fit([upper], trusting),
        lambda: load_tokenizer_of(base_spec(ModelSpec(adapter=str(lower), trust_remote_code=True))),
        lambda: load_tokenizer_of(trusting),
    ):
        with suppress(UserError):
            use()
        assert not marker.exists()
    with pytest.raises(UserError, match="would run the code of the base"):  # as for one on the hub
        load_whole(AutoModelForCausalLM.from_pretrained, str(lower), {"trust_remote_code": True})
    assert not marker.exists()
    load_model(ModelSpec(path=str(base), trust_remote_code=True))
    assert marker.exists()  # so the code is there to be run
