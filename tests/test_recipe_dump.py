"""A recipe written out loads back to itself, and the key of a stage changes exactly with what its result depends on."""

from __future__ import annotations

import json
from typing import Any

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daekit.recipe import Recipe, load_recipe, load_recipe_text, stage_key, to_dict, to_yaml
from daekit.recipe.load import resolve
from daekit.recipe.objective import Objective
from daekit.recipe.schema import (
    DAEStage,
    EvaluationSpec,
    KDStage,
    LoraSpec,
    MixtureSpec,
    ModelSpec,
    SFTStage,
    SourceSpec,
    StageSpec,
    TeacherSpec,
    TokenizerSpec,
    TokenizerTraining,
    WeightedModelSpec,
)
from tests.helpers.recipes import BASE, RECIPES, load

# Texts that YAML is known to take for something else are drawn often.
TRAPS = ["no", "on", "null", "~", "1e-4", "010", "12:30", "2026-11-22", "1_000", "<<", "=", "a: b", "#x", "-", "true "]
texts = st.sampled_from(TRAPS) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
# Model paths must not look like local ones (those must exist), nor like a reference to a stage.
paths = texts.filter(lambda text: not text.startswith((".", "/", "~", "stage:")))
paths = paths.filter(lambda text: not text.endswith((".jsonl", ".json", ".ndjson", ".parquet", ".model")))
floats = st.floats(1e-6, 1e6)
counts = st.integers(1, 10**9)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)


@st.composite
def models(draw: st.DrawFn, earlier: list[str]) -> ModelSpec:
    ways = ["path", "config", *(["stage"] if earlier else [])]
    way = draw(st.sampled_from(ways))
    dtype: Any = draw(st.sampled_from(["auto", "float32", "bfloat16", "float16"]))
    if way == "stage":
        return ModelSpec(stage=draw(st.sampled_from(earlier)), dtype=dtype)
    if way == "config":
        return ModelSpec(config={**draw(st.dictionaries(texts, anything, max_size=3)), "model_type": "mistral"}, dtype=dtype)
    return ModelSpec(path=draw(paths), dtype=dtype, revision=draw(st.none() | texts), trust_remote_code=draw(st.booleans()))


@st.composite
def teachers(draw: st.DrawFn, earlier: list[str]) -> TeacherSpec:
    if draw(st.booleans()):
        return TeacherSpec(model=draw(models(earlier)))
    weight = draw(st.floats(0.01, 0.99))
    members = tuple(WeightedModelSpec(model=draw(models(earlier)), weight=each) for each in (weight, 1 - weight))
    return TeacherSpec(ensemble=members, average=draw(st.sampled_from(["logits", "probabilities"])))


layers = st.sampled_from(["uniform", "last_2"]) | st.lists(st.tuples(counts, counts), min_size=1).map(tuple)
losses = st.builds(
    Objective,
    ce_weight=floats,
    divergence=st.sampled_from(["forward_kl", "jsd", "tv"]),
    temperature=floats,
    hidden_weight=floats,
    hidden_layers=layers,
    hidden_loss=st.sampled_from(["cosine", "mse"]),
)


def plain(loss: Objective) -> Objective:
    """Without what an ensemble has not."""
    return loss.model_copy(update={"hidden_weight": 0.0, "hidden_layers": "uniform", "hidden_loss": "cosine"})


loras = st.builds(LoraSpec, r=st.integers(1, 4096), lora_dropout=st.floats(0, 0.9), target_modules=texts | st.just(("q", "no")))
trainers = st.fixed_dictionaries(
    {},
    optional={
        "learning_rate": floats,
        "max_steps": counts,
        "max_length": st.none() | counts,
        "save_strategy": st.sampled_from(["no", "steps"]),
        "packing": st.booleans(),
        "run_name": texts,
        "report_to": st.lists(texts, max_size=2),
        "lr_scheduler_kwargs": st.dictionaries(texts, anything, max_size=2),
    },
).filter(lambda options: not options.get("packing") or options.get("max_length", 1) is not None)


@st.composite
def stages(draw: st.DrawFn, sources: dict[str, SourceSpec], earlier: list[str]) -> StageSpec:
    names = tuple(draw(st.lists(st.sampled_from(sorted(sources)), min_size=1, unique=True)))
    data = MixtureSpec(sources=names)
    if draw(st.booleans()):
        data = MixtureSpec(sources=names, weights=tuple(draw(floats) for _ in names), rows=draw(st.none() | counts))
    student = draw(models(earlier) if not earlier else st.none() | models(earlier))
    lora = None if student is not None and student.config is not None else draw(st.none() | loras)
    common: dict[str, Any] = {"data": data, "student": student, "trainer": draw(trainers), "lora": lora}
    kind = draw(st.sampled_from(["sft", "kd", "dae"]))
    if kind == "sft":
        return SFTStage(type="sft", **common)
    if kind == "kd":
        teacher = draw(teachers(earlier))
        return KDStage(type="kd", teacher=teacher, loss=plain(draw(losses)) if teacher.ensemble else draw(losses), **common)
    domains = sorted({sources[name].domain for name in names})
    experts = {domain: draw(teachers(earlier)) for domain in domains}
    reference = draw(st.none() | teachers(earlier))
    return DAEStage(type="dae", teachers=experts, reference=reference, loss=plain(draw(losses)), **common)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    validation: dict[str, Any] = draw(
        st.sampled_from([{"validation": "builtin:shop"}, {"validation_split": "no"}, {"holdout": 5}])
    )
    source = st.builds(
        SourceSpec,
        domain=st.sampled_from(["no", "a-b", "x_1", "é"]),
        path=paths.filter(lambda text: not text.startswith("builtin:")),
        split=texts,
        limit=st.none() | counts,
        columns=st.dictionaries(
            st.sampled_from(["prompt", "text"]),
            texts.filter(lambda text: not {*"{}"} & {*text}) | st.just("{a} {b}"),
            max_size=2,
        ),
        **{key: st.just(value) for key, value in validation.items()},
    )
    sources = draw(st.dictionaries(st.sampled_from(["one", "no", "3", "null"]), source, min_size=1))
    chosen: dict[str, StageSpec] = {}
    for name in draw(st.lists(st.sampled_from(["kd", "on", "1e3", "dae"]), min_size=1, max_size=3, unique=True)):
        chosen[name] = draw(stages(sources, list(chosen)))
    training = st.builds(TokenizerTraining, vocab_size=counts, kind=st.sampled_from(["bpe", "words"]))
    tokenizer = st.builds(TokenizerSpec, path=paths) | st.builds(TokenizerSpec, train=training, chat_template=texts)
    evaluation = st.builds(EvaluationSpec, limit=st.none() | counts, generate=st.booleans())
    return Recipe(
        name=draw(texts),
        output_dir=draw(texts.filter(lambda text: not text.startswith(("~", "/")) and "\0" not in text)),
        sources=sources,
        stages=chosen,
        seed=draw(st.integers(0, 2**31)),
        tokenizer=draw(tokenizer),
        evaluation=draw(st.none() | evaluation),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(recipes())
def test_yaml_round_trip(recipe: Recipe) -> None:
    resolved = resolve(recipe)
    assert load_recipe_text(to_yaml(recipe), "round-trip") == resolved
    assert load_recipe_text(to_yaml(resolved), "round-trip") == resolved
    for name in recipe.stages:
        key = stage_key(recipe, name)
        assert key == stage_key(resolved, name)
        assert json.loads(json.dumps(key, allow_nan=False)) == key


def test_shipped_recipes_round_trip_and_are_plain() -> None:
    for path in RECIPES:
        recipe = load_recipe(path)
        assert load_recipe_text(to_yaml(recipe), path.name) == recipe
        # Other YAML readers must understand the same.
        assert yaml.safe_load(to_yaml(recipe)) == json.loads(json.dumps(to_dict(recipe)))


def test_stage_key_changes_with_what_the_result_depends_on() -> None:
    recipe = load(BASE)
    kd, dae = stage_key(recipe, "kd"), stage_key(recipe, "dae")
    assert dae["stages"] == {"kd": kd}
    changes_both = ["seed=1", "stages.kd.loss.temperature=2", "sources.general.limit=5", "tokenizer=t", "stages.kd.lora.r=4"]
    for override in changes_both:
        changed = load(BASE, override)
        assert stage_key(changed, "kd") != kd, override
        assert stage_key(changed, "dae") != dae, override
    for override in ["sources.shop.limit=5", "stages.dae.trainer.learning_rate=1", "stages.dae.student=some/other"]:
        changed = load(BASE, override)
        assert stage_key(changed, "kd") == kd, override
        assert stage_key(changed, "dae") != dae, override
    unchanged = [
        "name=other",
        "output_dir=elsewhere",
        "evaluation={}",
        "stages.kd.trainer.logging_steps=3",
        "sources.general.validation=builtin:chat",
        "stages.kd.teacher.offload=true",
        "stages.kd.teacher.device_map=auto",
        "stages.kd.teacher.device_map={model: 0, lm_head: cpu}",
    ]
    for override in unchanged:
        assert stage_key(load(BASE, override), "kd") == kd, override
        assert stage_key(load(BASE, override), "dae") == dae, override


def test_stage_key_holds_validation_rows_when_the_training_looks_at_them() -> None:
    best = ["stages.kd.trainer.load_best_model_at_end=true", "stages.kd.trainer.eval_strategy=epoch"]
    with_rows = stage_key(load(BASE, *best, "sources.general.validation=builtin:chat"), "kd")
    assert with_rows != stage_key(load(BASE, *best), "kd")


def test_stage_key_holds_the_sources_of_a_trained_tokenizer() -> None:
    train = "tokenizer={train: {vocab_size: 10}}"
    assert set(stage_key(load(BASE, train), "kd")["sources"]) == {"shop", "general"}
    assert set(stage_key(load(BASE), "kd")["sources"]) == {"general"}
