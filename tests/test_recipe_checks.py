"""Every cross-check of a recipe, provoked once, alone: nothing else may be reported."""

from __future__ import annotations

import importlib.util

import pytest

from daekit.recipe import trainer_options
from tests.helpers.recipes import BASE, errors, load

ENSEMBLE = "{ensemble: [{model: a, weight: 0.5}, {model: b, weight: 0.5}]}"
CONFIG = "{config: {model_type: mistral}}"

# (overrides that provoke it, what the one error says)
PROVOKED = [
    # a stage and its type
    (["stages.kd.teacher=null"], "stages.kd.teacher: wants a path or a mapping, not null"),
    (["stages.kd.teachers={general: a}"], "stages.kd.teachers: a kd stage follows one `teacher`"),
    (["stages.kd.reference=a"], "stages.kd.reference: a kd stage has no reference"),
    (["stages.kd.reference_domains=[general]"], "stages.kd.reference_domains: a kd stage has no reference"),
    (["stages.dae.teachers={}"], "stages.dae.teachers: must not be empty"),
    (["stages.dae.teacher=a"], "stages.dae.teacher: a dae stage names a teacher per domain"),
    (["stages.kd={type: sft, student: a, teacher: b, data: [shop]}"], "stages.kd.teacher: an sft stage learns"),
    (["stages.kd={type: sft, student: a, teachers: {x: b}, data: [shop]}"], "stages.kd.teachers: an sft stage learns"),
    (["stages.kd={type: sft, student: a, reference: b, data: [shop]}"], "stages.kd.reference: an sft stage learns"),
    (["stages.kd={type: sft, student: a, reference_domains: [x], data: [shop]}"], "an sft stage has no reference"),
    (["stages.kd={type: sft, student: a, loss: {ce_weight: 1}, data: [shop]}"], "stages.kd.loss: an sft stage has"),
    (["stages.kd={type: sft, student: a, loss: {}, data: [shop]}"], "stages.kd.loss: an sft stage has"),
    (["stages.kd.seed=-1"], "stages.kd.seed: -1 must not be negative"),
    (["seed=-1"], "seed: -1 must not be negative"),
    # names
    (["stages.dae.data=[shop, genral]"], "no source 'genral' (there are: shop and general); did you mean 'general'?"),
    (["stages.dae.data={shop: 1, genral: 1}"], "stages.dae.data.genral: there is no source 'genral'"),
    (["stages.dae.teachers.ecommerce=stage:kdd"], "there is no stage 'kdd' (earlier ones: kd); did you mean 'kd'?"),
    (["stages.dae.teachers.ecommerce=stage:dae"], "the stage 'dae' refers to its own result"),
    (["stages.kd.teacher=stage:dae"], "the stage 'dae' runs after 'kd'"),
    (["stages.dae.student=stage:x"], "stages.dae.student: there is no stage 'x'"),
    (["stages.dae.reference=stage:x"], "stages.dae.reference: there is no stage 'x'"),
    (["stages.kd.student=null"], "stages.kd.student: the first stage has no stage before it"),
    (["stages.kd.student={dtype: float32}"], "exactly one of path, stage and config; it has none of them"),
    (["sources.a/b={domain: x, path: 'builtin:shop'}"], "the name 'a/b' may hold letters"),
    (["sources.rows={domain: x, path: 'builtin:shop'}"], "sources.rows: this name is taken"),
    (["sources.general.domain=a b", "stages.dae.reference_domains=[a b]"], "the domain 'a b' may hold letters"),
    (["stages.a b={type: sft, data: [shop]}"], "stages.a b: the name 'a b' may hold letters"),
    (["name=''"], "name: must not be empty"),
    (["output_dir=''"], "output_dir: must not be empty"),
    # columns and domains that are known before a row is read
    (["sources.shop.columns={prompt: '{page'}"], "sources.shop.columns.prompt: '{page' has a brace without its other"),
    (["sources.shop.columns={prompt: 'page}'}"], "sources.shop.columns.prompt: 'page}' has a brace without its other"),
    (["sources.shop.columns={prompt: '{a}{b'}"], "sources.shop.columns.prompt: '{a}{b' has a brace without its other"),
    (
        ["stages.dae.select={gain: ecomerce, forgetting: {ecommerce: 1}}", "stages.dae.trainer={eval_strategy: epoch}"],
        "stages.dae.select.gain: 'ecomerce' has no validation rows in this stage (there are: ecommerce); did you mean",
    ),
    (
        ["stages.dae.select={gain: ecommerce, forgetting: {ce/general: 1}}", "stages.dae.trainer={eval_strategy: epoch}"],
        "stages.dae.select.forgetting.ce/general: 'general' has no validation rows",
    ),
    (
        ["stages.dae.select={gain: ecommerce, forgetting: {ecommerce: -1}}", "stages.dae.trainer={eval_strategy: epoch}"],
        "stages.dae.select.forgetting.ecommerce: -1 must not be negative",
    ),
    # models
    (["stages.kd.student={path: a, stage: b}"], "exactly one of path, stage and config; not path and stage"),
    (["stages.kd.teacher=label"], "'label' is no model here; did you mean 'labels'?"),
    (["stages.kd.teacher={path: labels}"], "did you mean 'labels'? (that word alone; a directory is written ./labels)"),
    (["stages.kd.teacher={dtype: auto}"], "stages.kd.teacher: a model needs exactly one"),
    (
        ["stages.kd.teacher={average: probabilities}"],
        "a teacher is exactly one of a model, an ensemble, a served model and labels",
    ),
    (["stages.kd.teacher={model: a, average: probabilities}"], "only an ensemble is averaged"),
    (["stages.kd.teacher={model: a, ensemble: [{model: b, weight: 1}]}"], "a teacher is exactly one of"),
    (["stages.kd.student=''"], "stages.kd.student: must not be empty"),
    (["stages.dae.student={stage: kd, revision: x}"], "only a model with a `path` has a revision"),
    (["stages.kd.student={config: {}}", "tokenizer=t"], "needs its `model_type`"),
    (["stages.kd.student={config: {model_type: 5}}", "tokenizer=t"], "needs its `model_type`"),
    ([f"stages.kd.student={CONFIG}"], "stages.kd.student.config: a model from a config has no tokenizer"),
    ([f"stages.kd.teacher={CONFIG}"], "stages.kd.teacher.config: a model from a config has no tokenizer"),
    (
        ["stages.kd.student={config: {model_type: mistral}, quantization: 4bit}", "stages.kd.lora={}", "tokenizer=t"],
        "random weights cannot be quantized",
    ),
    (["stages.kd.student={path: a, quantization: 4bit}"], "a student in 4bit cannot be trained itself; add `lora`"),
    (["stages.kd.student={path: a, device_map: auto}"], "stages.kd.student.device_map: belongs to a teacher"),
    (["stages.kd.student={path: a, offload: true}"], "stages.kd.student.offload: belongs to a teacher"),
    (["stages.kd.teacher={path: a, offload: true, device_map: '0'}"], "stages.kd.teacher.offload: excludes device_map"),
    (["stages.kd.teacher={path: a, offload: true, quantization: 8bit}"], "does not work with quantization: 8bit"),
    (["stages.kd.teacher={path: a, device_map: {model: disk}}"], "stages.kd.teacher.device_map: disk is not supported"),
    (["stages.dae.reference={path: a, device_map: disk}"], "stages.dae.reference.device_map: disk is not supported"),
    (["stages.kd.teacher={path: a, device_map: {}}"], "stages.kd.teacher.device_map: must not be empty"),
    (["stages.kd.teacher={path: a, device_map: atuo}"], "stages.kd.teacher.device_map: 'atuo' is no device"),
    (["stages.kd.teacher={path: a, device_map: meta}"], "stages.kd.teacher.device_map: 'meta' is no device"),
    (["stages.kd.teacher={path: a, device_map: {model: auto}}"], "stages.kd.teacher.device_map: 'auto' is no device"),
    (["stages.kd.teacher={path: a, device_map: {model: cuda, lm_head: 'cuda:x'}}"], "device_map: 'cuda:x' is no device"),
    (["stages.kd.teacher={config: {model_type: mistral}, device_map: cpu}", "tokenizer=t"], "is made where the student is"),
    (
        ["stages.kd.lora={}", "stages.dae.student={stage: kd, quantization: 4bit}", "stages.dae.lora={}"],
        "stages.dae.student.quantization: the result of stage 'kd' is an adapter, which is merged into its 16-bit base",
    ),
    (
        ["stages.kd.lora={}", "stages.dae.student.quantization=4bit", "stages.dae.lora={}"],
        "stages.dae.student.quantization: the result of stage 'kd' is an adapter",
    ),
    (
        ["stages.kd.lora={}", "stages.dae.reference={stage: kd, quantization: 8bit}"],
        "stages.dae.reference.quantization: the result of stage 'kd' is an adapter",
    ),
    (["stages.kd.lora.r=0"], "stages.kd.lora.r: 0 must be greater than 0"),
    (["stages.kd.lora.lora_alpha=-1"], "stages.kd.lora.lora_alpha: -1 must be greater than 0"),
    (["stages.kd.lora.lora_dropout=1"], "lora_dropout: 1 must be below 1"),
    (["stages.kd.student=./absent"], "'./absent' does not exist"),
    (["stages.kd.student=~/absent-student"], "/absent-student' does not exist"),
    (["stages.kd.teacher=../absent/model"], "'../absent/model' does not exist"),
    # domains of a dae stage
    (["sources.general.domain=genral"], "the rows of domain 'genral' have no teacher; did you mean 'general'?"),
    (["stages.dae.teachers.other=a"], "a teacher without rows: no source of this stage has the domain 'other'"),
    (["stages.dae.teachers.general=a"], "the domain 'general' is also in reference_domains"),
    (["stages.dae.reference_domains=[general, othr]"], "reference_domains: no source of this stage has the domain 'othr'"),
    # rows
    (["stages.dae.data={shop: 0, general: 1}"], "the weight of 'shop' is 0.0, must be greater than 0"),
    (["stages.kd.data=[]"], "stages.kd.data: must not be empty"),
    (["stages.kd.data=[general, general]"], "the source 'general' is listed twice"),
    (["stages.dae.data={sources: {shop: 1, general: 1}, rows: 0}"], "rows: 0 must be greater than 0"),
    (["stages.kd.data={sources: [general], rows: 5}"], "rows belongs to a weighted mixture"),
    (["sources.shop.holdout=5"], "validation and holdout exclude each other"),
    (["sources.shop.validation_split=train"], "validation and validation_split exclude each other"),
    (["sources.shop.limit=0"], "sources.shop.limit: 0 must be greater than 0"),
    (["sources.general.holdout=0"], "sources.general.holdout: 0 must be greater than 0"),
    (["sources.general.validation_limit=5"], "there are no validation rows to limit"),
    (["sources.shop.validation_limit=-1"], "validation_limit: -1 must be greater than 0"),
    (["sources.shop.path='builtin:shp'"], "is not an embedded corpus (skills, chat and shop); did you mean 'shop'?"),
    (["sources.shop.validation='builtin:x'"], "sources.shop.validation: 'builtin:x' is not an embedded corpus"),
    (["sources.shop.path=absent.jsonl"], "'absent.jsonl' does not exist; correct it, or override this key"),
    (["sources.shop.path=absent.parquet"], "'absent.parquet' does not exist"),
    (["sources.shop.validation=/absent/rows"], "'/absent/rows' does not exist"),
    (["sources.shop.path=''"], "sources.shop.path: must not be empty"),
    # loss
    (["stages.kd.loss.temperature=0"], "temperature: 0 must be greater than 0"),
    (["stages.kd.loss.ce_weight=-0.5"], "ce_weight: -0.5 must not be negative"),
    (
        ["stages.kd.loss.prediction_weight=0"],
        "stages.kd.loss: ce_weight, prediction_weight, attention_weight and hidden_weight are all 0",
    ),
    (["stages.kd.loss={divergence: jsd, beta: 1}"], "beta: 1 must be below 1"),
    (["stages.kd.loss={divergence: jsd, beta: 0}"], "beta: 0 must be greater than 0"),
    (["stages.kd.loss.beta=0.3"], "beta belongs to divergence: jsd, not to forward_kl"),
    (["stages.kd.loss.attention_weight=-1"], "stages.kd.loss.attention_weight: -1 must not be negative"),
    (
        ["stages.kd.loss={attention_weight: 1, attention_layers: first_2}"],
        "stages.kd.loss.attention_layers: choose uniform",
    ),
    (["stages.kd.loss={hidden_weight: 1, hidden_layers: last_0}"], "stages.kd.loss.hidden_layers: choose uniform"),
    (
        ["stages.kd.loss={attention_weight: 1, attention_layers: [[0, 1, 2]]}"],
        "stages.kd.loss.attention_layers: choose uniform",
    ),
    (["stages.kd.loss={hidden_weight: 1, hidden_layers: [[0, -1]]}"], "stages.kd.loss.hidden_layers: choose uniform"),
    (["stages.kd.loss={hidden_weight: 1, hidden_layers: []}"], "stages.kd.loss.hidden_layers: choose uniform"),
    (["stages.kd.loss={attention_weight: 1, attention_layers: [0]}"], "stages.kd.loss.attention_layers: choose uniform"),
    (
        ["stages.kd.loss={attention_weight: 1, attention_relation_heads: 0}"],
        "attention_relation_heads: 0 must be at least 1",
    ),
    (["stages.kd.loss.attention_relation_heads=4"], "attention_relation_heads: belongs to attention_weight, which is 0"),
    (["stages.kd.loss.rollout_buffer=4"], "stages.kd.loss.rollout_buffer: belongs to on_policy, which is 0"),
    (["stages.kd.loss.on_policy=2"], "stages.kd.loss.on_policy: 2 "),
    (["stages.kd.loss={on_policy: 0.5, prediction_weight: 0, ce_weight: 1}"], "stages.kd.loss: on_policy=0.5: "),
    (["stages.kd.loss={on_policy: 1, ce_weight: 1}"], "stages.kd.loss: ce_weight=1 counts on rows with labels"),
    (["stages.kd.loss={on_policy: 1}", "stages.kd.teacher={model: a, cache: top_k}"], "stages.kd.loss.on_policy: a cache"),
    (["stages.kd.loss={on_policy: 1}", "stages.kd.teacher=labels"], "stages.kd.loss.on_policy: labels"),
    (["stages.kd.loss={on_policy: 1}", "stages.kd.trainer.packing=true"], "stages.kd.trainer.packing: lays rows into blocks"),
    (["stages.kd.loss={on_policy: 1}", "stages.kd.trainer.max_length=128"], "max_new_tokens: leaves no room for a prompt"),
    (["stages.kd.loss={normalize: rows, hidden_weight: 1}"], "stages.kd.loss: normalize=rows is for ce_weight"),
    (["stages.kd.loss.hidden_loss=mse"], "stages.kd.loss.hidden_loss: belongs to hidden_weight, which is 0"),
    (["stages.kd.loss.hidden_layers=last_2"], "stages.kd.loss.hidden_layers: belongs to hidden_weight, which is 0"),
    (["stages.kd.loss.hidden_loss=l1"], "stages.kd.loss.hidden_loss: l1 is not one of cosine, mse"),
    (
        [f"stages.kd.teacher={ENSEMBLE}", "stages.kd.loss.attention_weight=1"],
        "stages.kd.loss.attention_weight: an ensemble (teacher) has no attention or hidden states of its own; set",
    ),
    (
        [f"stages.dae.teachers.ecommerce={ENSEMBLE}", "stages.dae.loss.hidden_weight=1"],
        "stages.dae.loss.hidden_weight: an ensemble (teachers.ecommerce) has no attention or hidden states of its own",
    ),
    (["stages.kd.loss={divergence: skew_kl, skew_alpha: 1}"], "skew_alpha: 1 must be below 1"),
    (["stages.kd.loss={divergence: skew_reverse_kl, skew_alpha: -0.1}"], "skew_alpha: -0.1 must not be negative"),
    (["stages.kd.loss.skew_alpha=0.3"], "skew_alpha belongs to divergence: skew_kl or skew_reverse_kl, not to forward_kl"),
    (["stages.kd.loss={divergence: jsd, skew_alpha: 0.3}"], "skew_alpha belongs to divergence: skew_kl"),
    (["stages.kd.loss={divergence: skew_kl, beta: 0.3}"], "beta belongs to divergence: jsd, not to skew_kl"),
    (["stages.kd.trainer.skew_alpha=0.3"], "the objective is the stage's: set `stages.kd.loss.skew_alpha`"),
    ([f"stages.kd.student={CONFIG}", "stages.kd.lora={}", "tokenizer=t"], "stages.kd.lora: a student made from a config"),
    ([f"stages.kd.teacher={ENSEMBLE}", "stages.kd.teacher.ensemble.0.weight=0.4"], "sum to 0.9, must sum to 1"),
    (
        [f"stages.kd.teacher={ENSEMBLE}", "stages.kd.teacher.ensemble.0.weight=0"],
        "ensemble.0.weight: 0 must be greater than 0",
    ),
    # tokenizer and report
    (["tokenizer={}"], "tokenizer: needs exactly one of path and train"),
    (["tokenizer={path: a, train: {vocab_size: 10}}"], "tokenizer: needs exactly one of path and train"),
    (["tokenizer=./absent.model"], "tokenizer.path: './absent.model' does not exist"),
    (["tokenizer={train: {vocab_size: 0}}"], "vocab_size: 0 must be greater than 0"),
    (["tokenizer={train: {vocab_size: 9, sources: [shp]}}"], "there is no source 'shp'"),
    (["evaluation={models: [x]}"], "evaluation.models: there is no stage 'x'"),
    (["evaluation={models: [kd], baseline: dae}"], "evaluation.baseline: there is no evaluated stage 'dae'"),
    (["evaluation={sources: [x]}"], "evaluation.sources: there is no source 'x'"),
    (["evaluation={sources: [general]}"], "the source 'general' has no validation rows"),
    (["evaluation={}", "sources.shop.validation=null"], "evaluation: no source has validation rows"),
    (["evaluation={batch_size: 0}"], "evaluation.batch_size: 0 must be greater than 0"),
    # options of the trainer that the recipe decides, or that change the objective in silence
    (["stages.kd.trainer.output_dir=x"], "trainer.output_dir: set `output_dir` of the recipe"),
    (["stages.kd.trainer.seed=1"], "set `seed` of the recipe, or `stages.kd.seed`"),
    (["stages.kd.trainer.data_seed=1"], "set `seed` of the recipe"),
    (["stages.kd.trainer.label_smoothing_factor=0.1"], "label smoothing would change the objective silently"),
    (["stages.kd.trainer.loss_type=dft"], "the loss is set by ce_weight, prediction_weight and divergence"),
    (["stages.kd.trainer.fp16=true"], "would underflow; use bf16"),
    (["stages.kd.trainer.neftune_noise_alpha=5"], "would change the objective silently"),
    (["stages.kd.trainer.average_tokens_across_devices=false"], "false is refused"),
    (["stages.kd.trainer.use_liger_kernel=true"], "daekit has its own loss"),
    (["stages.kd.trainer.logging_nan_inf_filter=true"], "it would hide a loss that is not finite"),
    (["stages.kd.trainer.save_only_model=true"], "could not resume without its optimizer"),
    (["stages.kd.trainer.ignore_data_skip=true"], "would train on other rows"),
    (["stages.kd.trainer.eval_dataset=x"], "validation rows are set per source"),
    (["stages.kd.trainer.temperature=2"], "set `stages.kd.loss.temperature`"),
    (["stages.kd.trainer.trust_remote_code=true"], "`stages.kd.student.trust_remote_code`"),
    (["stages.kd.trainer.hub_token=x"], "a secret does not belong in a recipe"),
    # values of the trainer that it would stumble over late, or take for something else
    (["stages.kd.trainer.learning_rate=-1"], "stages.kd.trainer.learning_rate: -1 must not be negative"),
    (["stages.kd.trainer.warmup_steps=-1"], "stages.kd.trainer.warmup_steps: -1 must not be negative"),
    (["stages.kd.trainer.per_device_train_batch_size=0"], "per_device_train_batch_size: 0 must be greater than 0"),
    (["stages.kd.trainer.gradient_accumulation_steps=0"], "gradient_accumulation_steps: 0 must be greater than 0"),
    (["stages.kd.trainer.max_length=0"], "stages.kd.trainer.max_length: 0 must be greater than 0"),
    (["stages.kd.trainer.num_train_epochs=-1"], "stages.kd.trainer.num_train_epochs: -1 must be greater than 0"),
    (["stages.kd.trainer.max_steps=0"], "stages.kd.trainer.max_steps: 0 would train num_train_epochs instead"),
    (["stages.kd.trainer={packing: true, max_length: null}"], "stages.kd.trainer.packing: fills blocks of max_length tokens"),
]


def test_the_base_recipe_is_right() -> None:
    assert load(BASE).name == "base"


@pytest.mark.parametrize(
    ("overrides", "message"), PROVOKED, ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else ""
)
def test_a_mistake_is_reported_once_and_alone(overrides: list[str], message: str) -> None:
    lines = errors(BASE, *overrides)
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_a_misspelt_domain_never_follows_the_reference() -> None:
    without_teacher, without_rows = errors(BASE, "sources.shop.domain=ecomerce")
    assert "the rows of domain 'ecomerce' have no teacher; did you mean 'ecommerce'?" in without_teacher
    assert "a teacher without rows: no source of this stage has the domain 'ecommerce'" in without_rows
    assert "did you mean 'ecomerce'?" in without_rows


def test_no_sources_no_stages() -> None:
    lines = errors("name: x\noutput_dir: y\nsources: {}\nstages: {}\n")
    assert lines == [
        "line 3: sources: must not be empty",
        "line 4: stages: must not be empty",
    ]


@pytest.mark.parametrize(
    "overrides",
    [
        ["stages.kd.trainer.average_tokens_across_devices=true"],
        ["stages.kd.trainer.max_length=null"],
        ["stages.kd.trainer={max_steps: -1, num_train_epochs: 0.5, learning_rate: 0, packing: true}"],
        ["stages.kd.student={path: a, quantization: 4bit}", "stages.kd.lora={}"],
        ["stages.dae.loss={divergence: jsd, beta: 0.1}"],
        ["stages.dae.loss={divergence: skew_kl, skew_alpha: 0}"],
        ["stages.dae.loss={divergence: skew_reverse_kl, skew_alpha: 0.3}"],
        ["stages.dae.loss={divergence: tv}"],
        ["stages.dae.reference={ensemble: [{model: a, weight: 0.3}, {model: b, weight: 0.7}]}"],
        [f"stages.kd.teacher={ENSEMBLE}"],
        ["stages.dae.data=[shop]"],  # the default reference domain may have no rows
        ["sources.shop.path=."],
        [f"stages.kd.student={CONFIG}", "tokenizer={train: {vocab_size: 10}}"],
    ],
)
def test_what_is_allowed(overrides: list[str]) -> None:
    load(BASE, *overrides)


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer_options.trainer_options.cache_clear()
    trainer_options._parse.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    try:
        (line,) = errors(BASE, "stages.kd.trainer.max_steps=1")
        assert "transformers is not installed" in line
    finally:
        trainer_options.trainer_options.cache_clear()
        trainer_options._parse.cache_clear()


@pytest.mark.slow
def test_the_options_read_from_source_are_the_fields_of_sft_config() -> None:
    """TRL may move them; then this says so."""
    import dataclasses

    from trl import SFTConfig

    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    options = trainer_options.trainer_options()
    assert {*options.model_fields, *options.ELSEWHERE} >= fields >= {*options.model_fields}


def test_a_model_whose_name_no_file_system_takes_is_left_to_the_run() -> None:
    recipe = load(BASE, f"stages.kd.teacher={'x' * 5000}")
    assert [teacher.model and teacher.model.path for teacher in recipe.stages["kd"].teachers_by_key().values()] == ["x" * 5000]
