"""Planned models are the real ones: their parameters, their bytes in memory when quantised, their adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from daekit.errors import UserError
from daekit.models.loading import load_model
from daekit.planning.meta_model import MetaModel
from daekit.planning.resolve import ResolvedModel, known_shapes, resolve
from daekit.recipe import load_recipe_text
from daekit.recipe.schema import LoraSpec, ModelSpec
from tests.helpers import tiny

SMALL: dict[str, Any] = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "gemma2": {"head_dim": 16},
}


def shape(kind: str, quantization: str | None = None, dtype: torch.dtype = torch.bfloat16, **fields: Any) -> ResolvedModel:
    config = AutoConfig.for_model(kind, **(SMALL | FAMILIES.get(kind, {}) | fields))
    return ResolvedModel(config, dtype, quantization, torch.bfloat16)


@pytest.mark.parametrize(("name", "billions"), [("Mistral-7B-v0.1", 7.24), ("Mixtral-8x7B-v0.1", 46.70)])
def test_published_sizes(name: str, billions: float) -> None:
    assert known_shapes()[f"mistralai/{name}"]["parameters"] / 1e9 == pytest.approx(billions, abs=0.005)
    assert known_shapes()["models/mistral-2x7b"]["parameters"] / 1e9 == pytest.approx(12.88, abs=0.005)


@pytest.mark.parametrize(
    "entry", {id(each): each for each in known_shapes().values()}.values(), ids=lambda each: each["ids"][0]
)
def test_known_shapes_have_their_parameters(entry: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**entry["config"]))
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_meta_model_has_the_parameters_of_its_model(kind: str) -> None:
    real = AutoModelForCausalLM.from_config(shape(kind).config, dtype=torch.bfloat16)
    meta = MetaModel(shape(kind), trained=True)
    assert sum(p.values for p in meta.parameters()) == sum(p.numel() for p in real.parameters())
    assert sum(p.bytes for p in meta.parameters()) == 2 * sum(p.values for p in meta.parameters())
    assert all(p.trained for p in meta.parameters())
    assert len(meta.layers) == 3


@pytest.mark.parametrize(("targets", "dora"), [("all-linear", False), (("q_proj", "down_proj"), True)])
def test_an_adapter_is_that_of_peft(targets: Any, dora: bool) -> None:
    config = LoraConfig(
        r=4, target_modules=targets if isinstance(targets, str) else list(targets), use_dora=dora, task_type="CAUSAL_LM"
    )
    real = get_peft_model(AutoModelForCausalLM.from_config(shape("llama").config, dtype=torch.bfloat16), config)
    planned = list(MetaModel(shape("llama"), LoraSpec(r=4, target_modules=targets, use_dora=dora), trained=True).parameters())
    trained = [p for p in real.parameters() if p.requires_grad]
    assert sum(p.values for p in planned if p.trained) == sum(p.numel() for p in trained)
    assert sum(p.bytes for p in planned if p.trained) == sum(p.numel() * p.element_size() for p in trained)
    assert all(p.adapter == p.trained for p in planned)


@pytest.mark.parametrize(("quantization", "tolerance"), [("4bit", 0.001), ("8bit", 0.001)])
def test_quantised_weights_have_the_bytes_of_bitsandbytes(quantization: Any, tolerance: float, tmp_path: Path) -> None:
    config = shape("llama", hidden_size=256, intermediate_size=512).config
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    real = load_model(ModelSpec(path=str(tmp_path), dtype="bfloat16", quantization=quantization))
    planned = MetaModel(shape("llama", quantization, hidden_size=256, intermediate_size=512))
    assert sum(p.bytes for p in planned.parameters()) == pytest.approx(_bytes(real), rel=tolerance)


def _bytes(model: torch.nn.Module) -> int:
    """Of everything that a loaded model holds, quantisation states included."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            total += sum(t.numel() * t.element_size() for t in parts)
        if (scales := getattr(weight, "SCB", None)) is not None:
            total += scales.numel() * scales.element_size()
    return total


def test_experts_are_planned_in_4_bits() -> None:
    fields = dict(hidden_size=256, intermediate_size=512)
    experts = [p for layer in MetaModel(shape("mixtral", "4bit", **fields)).layers for p in layer if p.values >= 4 * 256 * 512]
    assert len(experts) == 6
    for parameter in experts:
        assert 0.51 < parameter.bytes / parameter.values < 0.53
        assert parameter.products == 2 / 4


RECIPE = """\
name: planned
output_dir: runs/planned
tokenizer: {train: {vocab_size: 300}}
sources: {text: {domain: general, path: builtin:chat}}
stages:
  one: {type: sft, student: {config: {model_type: llama, num_hidden_layers: 2}, dtype: bfloat16}, data: [text]}
  two: {type: kd, student: {config: {model_type: llama, num_hidden_layers: 1}}, teacher: "stage:one", data: [text]}
"""


def test_a_stage_has_the_shape_of_its_student() -> None:
    recipe = load_recipe_text(RECIPE, "planned.yaml")
    result = resolve(recipe, ModelSpec(stage="one"))
    assert (result.config.num_hidden_layers, result.config.vocab_size, result.dtype) == (2, 300, torch.bfloat16)
    assert resolve(recipe, ModelSpec(stage="one", dtype="float32")).dtype == torch.float32
    student = recipe.stages["two"].student
    assert student is not None
    assert resolve(recipe, student).dtype == torch.float32


def test_a_directory_is_read(tmp_path: Path) -> None:
    tiny.model(kind="mixtral").to(torch.bfloat16).save_pretrained(tmp_path)
    found = resolve(load_recipe_text(RECIPE, "planned.yaml"), ModelSpec(path=str(tmp_path)))
    assert (found.config.model_type, found.config.num_local_experts, found.dtype) == ("mixtral", 4, torch.bfloat16)


def test_an_unknown_hub_id_names_the_remedy() -> None:
    with pytest.raises(UserError, match=r"nobody/nothing: its shape is not known.*hf download nobody/nothing config.json"):
        resolve(load_recipe_text(RECIPE, "planned.yaml"), ModelSpec(path="nobody/nothing"))


CUT = """
name: cut
output_dir: x
sources: {skills: {domain: general, path: "builtin:skills"}}
tokenizer: {train: {vocab_size: 96, kind: words}}
stages:
  student:
    type: sft
    student: {from: TEACHER, WAY}
    data: [skills]
"""


def cut_student(way: str, teacher: str = "EleutherAI/pythia-1.4b") -> ResolvedModel:
    recipe = load_recipe_text(CUT.replace("TEACHER", teacher).replace("WAY", way), "cut.yaml")
    spec = recipe.stages["student"].student
    assert spec is not None
    return resolve(recipe, spec)


def test_a_student_that_is_cut_from_its_teacher_has_the_sizes_that_the_recipe_gives() -> None:
    cut = cut_student("shape: {hidden_size: 1024, intermediate_size: 4096, num_attention_heads: 8, num_key_value_heads: 8}")
    assert (cut.config.hidden_size, cut.config.num_hidden_layers, cut.dtype) == (1024, 24, torch.float16)
    assert sum(p.values for p in MetaModel(cut).parameters()) == known_shapes()["EleutherAI/pythia-410m"]["parameters"]
    for window in ([380_000_000, 420_000_000], [600_000_000, 700_000_000]):
        found = sum(p.values for p in MetaModel(cut_student(f"search: {{parameters: {window}}}")).parameters())
        assert window[0] <= found <= window[1]


def test_students_that_are_made_of_experts_or_impossible_are_not_planned() -> None:
    with pytest.raises(UserError, match="made of experts is not planned"):
        cut_student("dense: average", "mistralai/Mixtral-8x7B-v0.1")
    with pytest.raises(UserError, match="no such student can be cut"):
        cut_student("shape: {hidden_size: 1000}")
    with pytest.raises(UserError, match="no student of this space"):
        cut_student("search: {parameters: [1, 2]}")
