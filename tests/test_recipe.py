"""Loading a recipe: YAML -> typed, every error at once with its line, overrides."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from daekit.errors import UserError
from daekit.recipe import load_recipe, to_dict, to_yaml
from daekit.recipe.schema import KDStage, MixtureSpec, ModelSpec, TeacherSpec, TokenizerSpec
from tests.helpers.recipes import BASE, RECIPES, ROOT, errors, load


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    assert f"({path.relative_to(ROOT / 'recipes')})" in table
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    for word in ("What", "Hardware", "Run", "Plan", "Time", "Numbers", str(path.relative_to(ROOT))):
        assert word in header


def test_recipes_exist() -> None:
    assert len(RECIPES) >= 6


def test_sequential_and_all_experts_see_the_same_rows_and_experts() -> None:
    sequential, together = (load_recipe(ROOT / "recipes" / f"{name}-experts.yaml") for name in ("sequential", "all"))
    assert sequential.sources == together.sources
    (stage,) = together.stages.values()
    experts: dict[str, TeacherSpec] = {}
    rows: dict[str, float] = {}
    for part in sequential.stages.values():
        assert part.trainer == stage.trainer
        experts |= part.teachers
        for source, weight in zip(part.data.sources, part.data.weights, strict=True):
            rows[source] = rows.get(source, 0) + weight * (part.data.rows or 0)
    assert experts == stage.teachers
    assert rows == {
        source: weight * (stage.data.rows or 0) for source, weight in zip(stage.data.sources, stage.data.weights, strict=True)
    }


def test_shorthands() -> None:
    recipe = load(BASE + "tokenizer: some/tokenizer\n")
    kd, dae = recipe.stages["kd"], recipe.stages["dae"]
    assert kd.student == ModelSpec(path="some/student")
    assert kd.teacher == TeacherSpec(model=ModelSpec(path="some/teacher"))
    assert kd.data == MixtureSpec(sources=("general",))
    assert dae.data == MixtureSpec(sources=("shop", "general"), weights=(0.25, 0.75))
    assert recipe.tokenizer == TokenizerSpec(path="some/tokenizer")
    assert dae.student == ModelSpec(stage="kd")
    long = load(BASE, "stages.dae.data={sources: {shop: 1, general: 3}, rows: 40}", "stages.kd.data={sources: [general]}")
    assert long.stages["dae"].data == MixtureSpec(sources=("shop", "general"), weights=(1.0, 3.0), rows=40)
    assert long.stages["kd"].data == MixtureSpec(sources=("general",))
    ensemble = load(BASE, "stages.kd.teacher={ensemble: [{model: a, weight: 0.5}, {model: 'b', weight: 0.5}]}")
    assert ensemble.stages["kd"].teacher is not None
    assert [member.model.path for member in ensemble.stages["kd"].teacher.ensemble] == ["a", "b"]
    model = load(BASE, "stages.dae.teachers.ecommerce={stage: kd, quantization: 8bit}")
    assert model.stages["dae"].teachers["ecommerce"].model == ModelSpec(stage="kd", quantization="8bit")
    assert load(BASE, "stages.dae.teachers.ecommerce=stage:kd").stages["dae"].teachers["ecommerce"].model == ModelSpec(
        stage="kd"
    )


def test_where_a_teacher_lies() -> None:
    """A device (also a plain number), or a mapping of modules; in every place of a teacher."""
    one = [(text, text) for text in ("auto", "balanced_low_0", "cuda", "cuda:1", "xpu:0", "cpu", "1")]
    for text, device_map in (*one, ("{model: 0, lm_head: cpu}", None)):
        teacher = load(BASE, f"stages.kd.teacher={{path: a, device_map: {text}}}").stages["kd"].teacher
        assert teacher is not None and teacher.model is not None
        assert teacher.model.device_map == (device_map or {"model": "0", "lm_head": "cpu"})
    offloaded = "{ensemble: [{model: {path: a, offload: true}, weight: 0.5}, {model: b, weight: 0.5}]}"
    ensemble = load(BASE, f"stages.kd.teacher={offloaded}").stages["kd"].teacher
    assert ensemble is not None and [member.model.offload for member in ensemble.ensemble] == [True, False]
    with pytest.raises(UserError, match=r"device_map: wants a text or a mapping, not a list"):
        load(BASE, "stages.kd.teacher={path: a, device_map: [0, 1]}")


def test_the_merged_result_of_a_lora_stage_may_be_quantised() -> None:
    load(BASE, "stages.kd.lora.merge=true", "stages.dae.student.quantization=4bit", "stages.dae.lora.r=8")


def test_a_student_without_a_model_is_the_stage_before() -> None:
    recipe = load(BASE, "stages.dae.student.quantization=4bit", "stages.dae.lora.r=8")
    assert recipe.stages["dae"].student == ModelSpec(stage="kd", quantization="4bit")


def test_defaults_are_resolved() -> None:
    recipe = load(BASE + "evaluation: {}\ntokenizer: {train: {vocab_size: 100}}\n")
    assert recipe.evaluation is not None and recipe.tokenizer is not None and recipe.tokenizer.train is not None
    assert recipe.evaluation.names == ("student-as-it-was", "kd", "dae")
    assert recipe.evaluation.sources == ("shop",)
    assert recipe.tokenizer.train.sources == ("shop", "general")


@pytest.mark.parametrize(
    ("written", "key", "value"),
    [
        ("1e-4", "learning_rate", 1e-4),
        ("1E-4", "learning_rate", 1e-4),
        ("1.e-4", "learning_rate", 1e-4),
        ("2", "num_train_epochs", 2),
        ("1e3", "max_steps", 1000),
        ("null", "max_length", None),
        ("no", "save_strategy", "no"),
        ("'no'", "save_strategy", "no"),
        ("no", "packing", False),
        ("on", "packing", True),
        ("[wandb]", "report_to", ["wandb"]),
        ("{num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ],
)
def test_scalars_become_what_the_option_wants(written: str, key: str, value: object) -> None:
    trainer = load(BASE, f"stages.kd.trainer.{key}={written}").stages["kd"].trainer
    assert trainer == {key: value}
    assert type(trainer[key]) is type(value)


def test_scalars_become_what_the_schema_wants() -> None:
    recipe = load(
        BASE,
        "stages.kd.loss.temperature=2e0",
        "stages.kd.student.config={model_type: mistral, rope_theta: 1e6, tie_word_embeddings: no, bos: '1e6'}",
        "stages.kd.student.path=null",
        "tokenizer=t",
        "sources.shop.revision=0123456",
        "sources.general.domain=no",
        "stages.dae.reference_domains=[no]",
        "seed=1_000",
    )
    assert recipe.stages["kd"].loss.temperature == 2.0
    assert recipe.stages["kd"].student is not None
    assert recipe.stages["kd"].student.config == {
        "model_type": "mistral",
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "bos": "1e6",
    }
    assert recipe.sources["shop"].revision == "0123456"
    assert recipe.sources["general"].domain == "no"
    assert recipe.seed == 1000


@pytest.mark.parametrize("written", ["010", "12:30", "0x10", "1.5", "x", "true", "null", "'5'", "[1]"])
def test_what_is_not_plainly_a_whole_number_is_refused(written: str) -> None:
    (line,) = errors(BASE, f"seed={written}")
    assert "seed: wants a whole number" in line


def test_eight_mistakes_are_told_at_once_with_their_lines() -> None:
    text = textwrap.dedent("""\
        name: eight
        output_dirr: runs
        output_dir: runs
        sources:
          shop: {domain: ecommerce, path: builtin:shopp, holdout: 9}
          general:
            domain: general
            path: builtin:chat
            limit: many
        stages:
          kd:
            type: kdd
            student: some/student
            teacher: some/teacher
            data: [generall]
          dae:
            type: dae
            teachers:
              ecomerce: some/expert
            data: [shop, general]
            overlong: truncat
            trainer:
              learning_rat: 1e-5
        evaluation: {baseline: dea}
        """)
    lines = errors(text)
    expected = [
        (2, "output_dirr: unknown key; did you mean 'output_dir'?"),
        (5, "sources.shop.path: 'builtin:shopp' is not an embedded corpus"),
        (9, "sources.general.limit: wants a whole number, not many"),
        (12, "stages.kd.type: kdd is not one of sft, kd, dae; did you mean 'kd'?"),
        (15, "stages.kd.data: there is no source 'generall'"),
        (18, "stages.dae.teachers.ecommerce: the rows of domain 'ecommerce' have no teacher; did you mean 'ecomerce'?"),
        (19, "stages.dae.teachers.ecomerce: a teacher without rows"),
        (21, "stages.dae.overlong: truncat is not one of error, truncate, drop; did you mean 'truncate'?"),
        (23, "stages.dae.trainer.learning_rat: unknown key; did you mean 'learning_rate'?"),
    ]
    for number, message in expected:
        assert sum(line.startswith(f"line {number}: {message}") for line in lines) == 1, (message, lines)
    assert any("evaluation.baseline: there is no evaluated stage 'dea'" in line for line in lines)
    assert len(lines) == len(expected) + 1


def test_one_error_does_not_bring_others_with_it() -> None:
    assert len(errors(BASE, "stages.kd.teacher=5x", "stages.kd.teacher=[a]")) == 1
    assert len(errors(BASE, "sources.shop=nothing")) == 1
    assert len(errors(BASE, "stages.kd.data=5")) == 1
    assert len(errors(BASE, "stages.dae.teachers.ecommerce={pth: x}")) == 1
    assert len(errors(BASE, "stages.kd.type=kdd")) == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "[1]", "seed: wants a whole number, not a list"),
        ("name", "true", "name: wants a text, not true"),
        ("name", "null", "name: wants a text, not null"),
        ("stages", "[]", "stages: wants a mapping, not an empty list"),
        ("sources.shop", "text", "sources.shop: wants a mapping with the keys domain, path"),
        ("stages.kd.student.trust_remote_code", "1", "trust_remote_code: wants true or false, not 1"),
        ("stages.kd.loss.temperature", "hot", "temperature: wants a number, not hot"),
        ("stages.kd.loss.temperature", ".inf", "temperature: '.inf' is not a finite number"),
        ("stages.kd.loss.divergence", "forward-kl", "divergence: forward-kl is not one of forward_kl"),
        ("stages.kd.loss.divergence", "skew_revers_kl", "did you mean 'skew_reverse_kl'?"),
        ("stages.kd.student", "null", None),
        ("stages.kd.student", "[a]", "student: wants a path or a mapping, not a list"),
        ("stages.kd.teacher.ensembel", "[]", "ensembel: unknown key; did you mean 'ensemble'?"),
        ("stages.kd.data", "general", "data: wants a list of sources"),
        ("stages.kd.data", "{sources: [general], row: 3}", "data.row: unknown key; did you mean 'rows'?"),
        ("stages.dae.reference_domains", "general", "reference_domains: wants a list"),
        ("stages.dae.lora.target_modules", "[1, [2]]", "target_modules.1: wants a text, not a list"),
        ("stages.dae.lora.target_modules", "{a: 1}", "target_modules: wants a text"),
        ("sources.shop.columns.promt", "x", "columns.promt: unknown key; it must be one of"),
        ("tokenizer", "[x]", "tokenizer: wants a path or a mapping"),
        ("tokenizer", "{train: {}}", "tokenizer.train.vocab_size: this required key is missing"),
        ("stages.kd.trainer", "3", "trainer: wants a mapping, not 3"),
        ("stages.kd.trainer.learning_rate", "fast", "learning_rate: wants a number, not fast"),
        ("stages.kd.trainer.packing", "1", "packing: wants true or false, not 1"),
        ("stages.kd.trainer.lr_scheduler_type", "cosin", "lr_scheduler_type: cosin is not one of linear"),
        ("stages.kd.trainer.eval_strategy", "false", "eval_strategy: false is not one of no, steps, epoch"),
        ("stages.kd.trainer.parallelism_config", "{a: 1}", "cannot be set in a recipe"),
        ("stages.kd.student", "!!python/name:os.system ''", "the tag"),
        ("stages.kd.student", "!!int abc", "the tag"),
        ("stages.kd.trainer", "{a: 1, a: 2}", "a: this key is given twice"),
    ],
)
def test_wrong_types_and_keys(key: str, value: str, message: str | None) -> None:
    lines = errors(BASE, f"{key}={value}")
    assert len(lines) == 1
    assert (message or "the first stage has no stage before it") in lines[0]


@pytest.mark.parametrize("missing", ["name", "output_dir", "sources", "stages"])
def test_missing_required_key(missing: str) -> None:
    lines = errors(("\n" + BASE).replace(f"\n{missing}:", f"\n{missing}x:"))
    assert any(f"{missing}: this required key is missing" in line for line in lines)
    assert len(lines) == 2  # the other one is the unknown key


def test_duplicate_key_names_both_lines() -> None:
    (line,) = errors(BASE + "seed: 1\nseed: 2\n")
    assert line == "line 17: seed: this key is given twice (first in line 16); keep one"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty"),
        ("# nothing\n", "the recipe is empty"),
        ("- a\n", "wants a mapping with the keys name"),
        ("a: [1\nb: 2\n", "line 2, column 2: not valid YAML"),
        ("a: &x [*x]\n", "an anchor contains an alias of itself"),
        ("a: &x {<<: *x}\n", "none that contains itself"),
        ("? [a]\n: 1\n", "a key must be a name"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("[" * 500, "nested too deeply"),
        (
            "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 8)),
            "this is not a recipe",
        ),
    ],
    ids=["empty", "comment", "list", "syntax", "alias", "merge", "key", "documents", "deep", "bomb"],
)
def test_what_is_no_recipe_at_all(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load(text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        load_recipe(tmp_path / "absent.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_recipe(binary)


def test_merge_keys_fill_in_and_never_replace() -> None:
    recipe = load(
        BASE.replace("data: [general]", "data: [general]\n    trainer: &t {learning_rate: 1e-3, max_steps: 5}").replace(
            "type: dae", "type: dae\n    trainer: {max_steps: 7, <<: *t}"
        )
    )
    assert recipe.stages["dae"].trainer == {"max_steps": 7, "learning_rate": 1e-3}


def test_overrides() -> None:
    recipe = load(
        BASE,
        "stages.dae.lora.r=8",
        "stages.kd.student.quantization=4bit",
        "stages.kd.lora={}",
        "stages.kd.teacher={ensemble: [{model: a, weight: 1}]}",
        "stages.kd.teacher.ensemble.0.model=stage=1",
        "sources.extra={domain: x, path: 'builtin:skills'}",
        "stages.dae.trainer.learning_rate=1e-5",
        "stages.dae.trainer.learning_rate=1e-6",
    )
    assert recipe.stages["dae"].lora is not None and recipe.stages["dae"].lora.r == 8
    assert recipe.stages["kd"].student == ModelSpec(path="some/student", quantization="4bit")
    assert recipe.stages["kd"].teacher is not None
    assert recipe.stages["kd"].teacher.ensemble[0].model == ModelSpec(path="stage=1")
    assert recipe.sources["extra"].domain == "x"
    assert recipe.stages["dae"].trainer["learning_rate"] == 1e-6
    assert load(BASE, "stages.kd.lora.r=3", "stages.kd.lora=null").stages["kd"].lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "override 'seed': is not of the form key.sub=value"),
        ("=3", "is not of the form"),
        ("stages..kd=3", "is not of the form"),
        ("seed=", "has no value; write null"),
        ("seed=[1", "not valid YAML"),
        ("sed=1", "override 'sed=1': sed: unknown key; did you mean 'seed'?"),
        ("stages.dea.lora.r=1", "stages has no 'dea'; did you mean 'dae'?"),
        ("stages.dae.lorra.r=1", "lorra: unknown key; did you mean 'lora'?"),
        ("stages.kd.data.general=1", "stages.kd.data is a list of 1"),
        ("stages.kd.data.1=shop", "stages.kd.data is a list of 1"),
        ("stages.dae.data.shop.x=1", "stages.dae.data.shop is 0.25, not a mapping"),
        ("stages.dae.data.shop.x.y=1", "stages.dae.data.shop is 0.25, not a mapping"),
        ("stages.kd.trainer={max_steps: 1, max_steps: 2}", "stages.kd.trainer.max_steps: this key is given twice"),
    ],
)
def test_bad_overrides_are_errors_like_those_of_the_file(override: str, message: str) -> None:
    lines = errors(BASE + "sedd: 5\n", override)
    assert lines[0].startswith("line 16: sedd: unknown key")
    assert message in lines[1]
    assert len(lines) == 2


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    recipe = load(BASE, "sources.shop.path='~/rows.jsonl'", "stages.kd.student='~'", "output_dir='~/out'")
    assert recipe.sources["shop"].path == str(tmp_path / "rows.jsonl")
    assert recipe.stages["kd"].student == ModelSpec(path=str(tmp_path))
    assert recipe.output_dir == str(tmp_path / "out")


def test_a_named_model_is_what_it_says_wherever_it_is_named() -> None:
    text = BASE.replace(
        "sources:",
        "models:\n  base: some/student\n  big: {path: some/teacher, dtype: bfloat16, quantization: 4bit}\nsources:",
        1,
    )
    plain = load(
        BASE,
        "stages.kd.student={path: some/student, dtype: float32}",
        "stages.kd.teacher={path: some/teacher, dtype: float16, quantization: 4bit}",
    )
    named = load(
        text, "stages.kd.student={path: model:base, dtype: float32}", "stages.kd.teacher={path: model:big, dtype: float16}"
    )
    assert named.stages == plain.stages and to_dict(named)["models"]["base"]["path"] == "some/student"
    assert load(to_yaml(named)) == named
    other = load(text, "stages.kd.teacher=model:big", "models.big=another/teacher", "evaluation.models=[{mine: model:base}]")
    assert isinstance(kd := other.stages["kd"], KDStage) and kd.teacher.model == ModelSpec(path="another/teacher")
    assert other.evaluation is not None and other.evaluation.models[0].path == "some/student"


def test_named_models_write_rows_and_build_on_one_another_but_not_on_themselves() -> None:
    text = BASE.replace("sources:", "models:\n  base: some/student\n  big: {path: some/teacher, dtype: bfloat16}\nsources:", 1)
    source = "sources.made={domain: general, generated: {model: {path: model:big, dtype: float16}, prompts: self, rows: 5}}"
    made = load(text, source).sources["made"].generated
    assert made is not None and (made.model.path, made.model.dtype) == ("some/teacher", "float16")
    kd = load(
        text, "models.third={path: model:big, dtype: float16}", "models.fourth=model:third", "stages.kd.teacher=model:fourth"
    )
    assert kd.stages["kd"] == load(text, "stages.kd.teacher={path: model:big, dtype: float16}").stages["kd"]
    assert kd.models["fourth"] == kd.models["third"] and load(to_yaml(kd)) == kd
    for models in ("{base: model:base}", "{base: {path: model:base}}", "{base: model:big, big: {path: model:base}}"):
        found = errors(text, f"models={models}", "stages.kd.student=model:base")
        assert any("stands for itself; give its path" in error for error in found), found


def test_a_model_that_is_not_named_is_an_error_where_it_is_used() -> None:
    text = BASE.replace("sources:", "models: {base: some/student}\nsources:", 1)
    (error,) = errors(text, "stages.kd.student=model:bass")
    assert (
        error.startswith("override 'stages.kd.student=model:bass': stages.kd.student: `models` names no 'bass'")
        and "'base'?" in error
    )
    (error,) = errors(BASE.replace("teacher: some/teacher", "teacher: model:base"))
    assert "line 10: stages.kd.teacher: `models` names no 'base' (there are: none)" in error


def test_what_is_wrong_with_a_named_model_is_told_once_where_it_is_named() -> None:
    text = BASE.replace("sources:", "models: {base: {path: /no/where, dtype: float23}}\nsources:", 1)
    uses = "stages.kd.student=model:base", "stages.kd.teacher=model:base", "stages.dae.reference=model:base"
    (error,) = errors(text, *uses)
    assert "models.base.dtype: float23 is not one of" in error
    (error,) = errors(text.replace(", dtype: float23", ""), *uses, "stages.dae.student={path: model:base}")
    assert "models.base: '/no/where' does not exist" in error
