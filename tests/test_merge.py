"""``daekit merge``: a plain model that is the base with its adapter, checked after it has been read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from daekit.cli import main
from daekit.errors import UserError
from daekit.models.loading import load_model
from daekit.models.merge import save_merged
from daekit.recipe.schema import ModelSpec
from tests.helpers import tiny
from tests.helpers.adapter_world import merged, save_adapter, save_base

IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("merge") / "base")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": dict(use_dora=True, init_lora_weights=True),
    "a head of its own": dict(modules_to_save=["lm_head"]),
    "on the output head": dict(target_modules=["q_proj", "lm_head"]),
    "biases": dict(bias="all"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_merging(kind: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also of the adapters that cannot share their base with others."""
    adapter = save_adapter(tmp_path / "adapter", base, **KINDS[kind])
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 0
    assert "checked on" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(merged(base, adapter)), rtol=1e-5, atol=1e-5)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == len(tiny.WORDS)
    assert not list(tmp_path.glob("*.half"))


def test_merging_onto_another_dtype_and_onto_a_merged_adapter(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base)
    check = save_merged(adapter, tmp_path / "half", "bfloat16")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16
    assert 0 < check.kl < 0.05 and check.difference < check.allowed < check.adapter
    save_merged(adapter, tmp_path / "first")
    second = save_adapter(tmp_path / "second", tmp_path / "first", seed=8, target_modules=["o_proj"])
    check = save_merged(second, tmp_path / "both")
    assert check.difference < 1e-4 < check.adapter
    with pytest.raises(UserError, match="both: exists already"):
        save_merged(second, tmp_path / "both")


def test_a_merge_that_is_another_model_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is what lies on disk: here a model in which one weight is not the merged one."""
    adapter = save_adapter(tmp_path / "adapter", base)

    def damaged(spec: Any) -> Any:
        if spec.path.endswith(".half"):
            file = Path(spec.path) / "model.safetensors"
            weights = load_file(file)
            weights["model.layers.1.mlp.down_proj.weight"] = load_file(base / "model.safetensors")[
                "model.layers.1.mlp.down_proj.weight"
            ]
            save_file(weights, file, metadata={"format": "pt"})
        return load_model(spec)

    monkeypatch.setattr("daekit.models.merge.load_model", damaged)
    with pytest.raises(UserError, match=r"the merged model is not the base with its adapter: .*logits differ by at most"):
        save_merged(adapter, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_beside_the_result_is_left_alone(base: Path, tmp_path: Path) -> None:
    """OUT.half may be what a killed merge has left, or the user's own; its files must not end in the result."""
    adapter = save_adapter(tmp_path / "adapter", base)
    (tmp_path / "out.half").mkdir()
    (tmp_path / "out.half" / "mine").write_text("x")
    with pytest.raises(UserError, match=r"out.half: exists already.* a merge that was stopped"):
        save_merged(adapter, tmp_path / "out")
    assert (tmp_path / "out.half" / "mine").read_text() == "x" and not (tmp_path / "out").exists()


def test_what_cannot_be_merged(base: Path, tmp_path: Path) -> None:
    for folder, message in ((base, "no directory with a LoRA adapter"), (tmp_path / "nowhere", "no directory with a LoRA")):
        with pytest.raises(UserError, match=message):
            save_merged(folder, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/out: cannot be made .*choose another OUT"):
        save_merged(tmp_path / "nowhere", tmp_path / "file" / "out")
    load_model(ModelSpec(path=str(base), quantization="4bit")).save_pretrained(tmp_path / "four")
    adapter = save_adapter(tmp_path / "adapter", base)
    config = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(config.replace(str(base), str(tmp_path / "four")))
    with pytest.raises(UserError, match=r"four: is quantised .* an adapter is merged into the 16-bit base"):
        save_merged(adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(config)
    weights = load_file(adapter / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"do not fit the model's adapter: 1 differ"):
        save_merged(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
