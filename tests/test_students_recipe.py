"""`student: {from: TEACHER, ...}` in a recipe: read, checked, written out, made once, trained, and `daekit init`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from daekit.cli import main
from daekit.errors import UserError
from daekit.recipe import load_recipe_text, stage_key, student_key, to_yaml
from daekit.recipe.load import resolve
from daekit.recipe.schema import CalibrationSpec, ModelSpec, Recipe, StudentSearchSpec, StudentSpec
from daekit.runtime import folders
from daekit.runtime.data import DataBuilder
from daekit.runtime.models import ModelBuilder
from daekit.runtime.run import init_students, run_recipe
from daekit.runtime.student import calibration_rows
from daekit.students.shapes import count_parameters

RECIPE = """
name: cut
output_dir: OUT
tokenizer: {train: {vocab_size: 400, kind: words}}
sources:
  skills: {domain: general, path: "builtin:skills", limit: 200}
  chat: {domain: general, path: "builtin:chat", limit: 100}
stages:
  teacher:
    type: sft
    student: {config: {model_type: llama, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3,
              num_attention_heads: 4, num_key_value_heads: 2}}
    data: [skills]
    trainer: &trainer {max_steps: 2, per_device_train_batch_size: 4, logging_steps: 1, gradient_checkpointing: false}
  student:
    type: kd
    student: STUDENT
    teacher: "stage:teacher"
    data: [skills]
    trainer: *trainer
"""
SHAPE = '{from: "stage:teacher", shape: {num_hidden_layers: 2, hidden_size: 24}, calibration: {tokens: 300}, fit_norms: true}'
DENSE = """{config: {model_type: mistral, hidden_size: 32, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
              num_key_value_heads: 1}}"""
SEARCH = """
      from: "stage:teacher"
      search: {parameters: [10000, 18000], blocks: 4, candidates: 20, tokens: [30, 120], objective: kl, granularity: fine}
      calibration: {sources: [chat], tokens: 600, max_length: 16}
"""


def recipe(out: Path, student: str, *overrides: str) -> Recipe:
    text = RECIPE.replace("OUT", str(out)).replace("STUDENT", student)
    return load_recipe_text(text, "cut.yaml", overrides)


def errors(student: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        recipe(Path("x"), student, *overrides)
    return str(error.value)


def test_what_the_yaml_says_is_read_and_written_out() -> None:
    spec = recipe(Path("x"), SEARCH).stages["student"].student
    assert spec == ModelSpec(
        init=StudentSpec(
            from_=ModelSpec(stage="teacher"),
            search=StudentSearchSpec(
                parameters=(10000, 18000), granularity="fine", blocks=4, objective="kl", candidates=20, tokens=(30, 120)
            ),
            calibration=CalibrationSpec(sources=("chat",), tokens=600, max_length=16),
        )
    )
    for student in (SEARCH, SHAPE, "{from: a/b, with: [c/d, {path: e/f, dtype: bfloat16}]}", "{from: a/b, keep_experts: 2}"):
        loaded = recipe(Path("x"), student)
        text = to_yaml(loaded)
        assert "\n      from:" in text and "from_" not in text and "with_" not in text
        assert load_recipe_text(text, "again.yaml") == loaded == resolve(loaded)
    assert recipe(Path("x"), SHAPE).stages["student"].student.init.calibration.sources == ("skills",)


def test_an_override_reaches_the_search() -> None:
    changed = recipe(Path("x"), SEARCH, "stages.student.student.search.candidates=7", "stages.student.student.from=some/model")
    assert changed.stages["student"].student.init.search.candidates == 7
    assert changed.stages["student"].student.init.from_ == ModelSpec(path="some/model")


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ('{from: "stage:teachr", shape: {hidden_size: 8}}', "there is no stage 'teachr'"),
        ('{from: "stage:teacher"}', "says not what to make of its teacher"),
        ('{from: "stage:teacher", shape: {hidden: 8}}', "shape.hidden: unknown key; it must be one of num_hidden_layers"),
        ('{from: "stage:teacher", shape: {hidden_size: 0}}', "shape.hidden_size: 0 must be at least 1"),
        ('{from: "stage:teacher", shape: {hidden_size: 8}, search: {parameters: [1, 2]}}', "finds the shape: remove"),
        ('{from: "stage:teacher", keep_experts: 2, dense: average}', "keep_experts and dense exclude each other"),
        ('{from: "stage:teacher", with: [a/b], shape: {hidden_size: 8}}', "with and shape exclude each other"),
        ('{from: "stage:teacher", dense: average, importance: first}', "importance: belongs to a student cut"),
        ('{from: "stage:teacher", search: {parameters: [5, 2]}}', r"parameters: 5 and 2: wants [smallest, largest]"),
        ('{from: "stage:teacher", search: {}}', "search.parameters: this required key is missing"),
        ('{from: "stage:teacher", search: {parameters: [1, 2], tokens: [9, 9]}}', "tokens: wants numbers that rise"),
        ('{from: "stage:teacher", search: {parameters: [1, 2], tokens: [200000]}}', "wants 200000 tokens, but"),
        ('{from: "stage:teacher", search: {parameters: [1, 2], strategy: grid, granularity: fine}}', "would never end"),
        ('{from: "stage:teacher", shape: {hidden_size: 8}, calibration: {sources: [skils]}}', "did you mean 'skills'?"),
        ("{from: {path: a/b, quantization: 4bit}, shape: {hidden_size: 8}}", "student cannot be made of quantised weights"),
        ("{from: {from: a/b, shape: {hidden_size: 8}}, shape: {hidden_size: 8}}", "only the student of a stage is made `from`"),
        ("{form: a/b, shape: {hidden_size: 8}}", "unknown key"),
        ('{from: "stage:student", shape: {hidden_size: 8}}', "refers to its own result"),
        ("{from: a/b, shape: {hidden_size: 8}, dtype: float32}", "unknown key"),
    ],
)
def test_contradictions_are_found_before_anything_is_loaded(student: str, message: str) -> None:
    assert message in errors(student)


def test_adapters_belong_to_whole_models() -> None:
    assert "must be trained whole before an adapter" in errors(SHAPE, "stages.student.lora={r: 2}")
    adapter = "{from: {path: a/b, adapter: c/d}, shape: {hidden_size: 8}}"
    offloaded = "{from: {path: a/b, offload: true, device_map: auto}, shape: {hidden_size: 8}}"
    assert errors(offloaded).count("lies on one device as a whole") == 2
    assert "student.from.adapter: a student is made of whole models" in errors(adapter)


def test_a_teacher_is_not_made_from_another_model() -> None:
    wrong = errors("some/model", "stages.student.teacher={from: a/b, shape: {hidden_size: 8}}")
    assert "only the student of a stage is made `from` another model" in wrong


def test_keys_follow_what_a_student_depends_on() -> None:
    base = recipe(Path("x"), SHAPE)
    other_training = recipe(Path("x"), SHAPE, "stages.student.trainer.max_steps=9", "stages.student.loss.ce_weight=1")
    assert student_key(base, "student") == student_key(other_training, "student")
    for change in (
        "stages.student.student.shape.hidden_size=16",
        "stages.teacher.trainer.max_steps=3",
        "stages.student.seed=5",
        "sources.skills.limit=50",
        "stages.student.student.calibration.tokens=301",
    ):
        changed = recipe(Path("x"), SHAPE, change)
        assert student_key(base, "student") != student_key(changed, "student"), change
        assert stage_key(base, "student") != stage_key(changed, "student"), change
    assert stage_key(base, "student")["stages"].keys() == {"teacher"}


def test_a_stage_depends_on_what_its_student_is_made_from() -> None:
    apart = ("stages.student.teacher=some/model", "tokenizer={path: some/tokenizer}")
    key = stage_key(recipe(Path("x"), SEARCH, *apart), "student")
    assert key["stages"].keys() == {"teacher"} and key["sources"].keys() == {"skills", "chat"}
    assert student_key(recipe(Path("x"), SEARCH, *apart), "student")["sources"].keys() == {"chat"}


def test_rows_that_are_too_long_are_split_and_nothing_is_lost(tmp_path: Path) -> None:
    spec = recipe(tmp_path, SEARCH)
    data = DataBuilder(spec)
    whole, split = (
        calibration_rows(data, CalibrationSpec(sources=("chat",), tokens=600, max_length=length)) for length in (10**6, 16)
    )
    assert max(len(row["input_ids"]) for row in whole) > 16 == max(len(row["input_ids"]) for row in split)
    for name in ("input_ids", "labels"):
        assert [each for row in whole for each in row[name]] == [each for row in split for each in row[name]]


def test_a_searched_student_is_made_once_and_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = recipe(tmp_path, SEARCH)
    run_recipe(spec)
    printed = capsys.readouterr().out
    assert "[student] search 32/" in printed and "[student] student made from its teacher" in printed
    home = folders.RunFolder(tmp_path).student(student_key(spec, "student"))
    facts = json.loads(home.facts.read_text())
    start = AutoModelForCausalLM.from_pretrained(home.model)
    assert 10000 <= facts["parameters"] == start.num_parameters() == count_parameters(start.config) <= 18000
    assert facts["search"]["candidates"] == len({json.dumps(each["candidate"]) for each in log_of(home)})
    assert 0 < facts["search"]["score"] < 1  # KL; the text itself is worth about 5 nats per token
    assert home.plot.read_text().startswith("<svg")
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "stages" / "student" / "model")
    assert trained.config.hidden_size == start.config.hidden_size
    moved = (trained.model.embed_tokens.weight - start.model.embed_tokens.weight).abs().max()
    assert 0 < moved < 0.01
    made = home.model.stat().st_mtime_ns
    init_students(spec)
    run_recipe(spec)
    assert home.model.stat().st_mtime_ns == made and len(list((tmp_path / "students").iterdir())) == 1


def log_of(home: folders.StudentFolder) -> list[dict]:
    return [json.loads(line) for line in home.log.read_text().splitlines()[1:]]


def test_init_makes_what_training_begins_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first channels and layers of a teacher, cut by the command line and loaded again."""
    student = f"{{from: {DENSE}, shape: {{hidden_size: 24}}, importance: first}}"
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "out")).replace("STUDENT", student))
    assert main(["init", str(path)]) == 0
    assert "student made from its teacher" in capsys.readouterr().out
    assert not (tmp_path / "out" / "stages").exists()
    (made,) = (tmp_path / "out" / "students").glob("*/model")
    spec = recipe(tmp_path / "out", student)
    models = ModelBuilder(DataBuilder(spec))
    teacher = models.model(spec.stages["student"].student.init.from_, spec.seed)
    for cut in (AutoModelForCausalLM.from_pretrained(made), models.student("student")):
        assert torch.equal(cut.lm_head.weight, teacher.lm_head.weight[:, :24])
        assert torch.equal(cut.model.layers[0].mlp.up_proj.weight, teacher.model.layers[0].mlp.up_proj.weight[:, :24])


def test_init_says_what_it_cannot_make(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init_students(recipe(tmp_path, SHAPE))
    assert "its teacher comes from the stage 'teacher', which is not complete" in capsys.readouterr().out
    with pytest.raises(UserError, match="no stage makes its student from a teacher"):
        init_students(recipe(tmp_path, "some/model"))


@pytest.mark.parametrize(
    ("student", "model_type"),
    [
        ("{from: TEACHER, dense: top_neurons, calibration: {tokens: 200}}", "mistral"),
        ("{from: TEACHER, dense: average, shape: {intermediate_size: 16}, importance: first}", "mistral"),
        ("{from: TEACHER, keep_experts: 2, calibration: {tokens: 200}}", "mixtral"),
    ],
)
def test_students_of_a_mixture(student: str, model_type: str, tmp_path: Path) -> None:
    mixture = (
        "{config: {model_type: mixtral, hidden_size: 32, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2, "
        "num_key_value_heads: 1, num_local_experts: 4}}"
    )
    spec = recipe(tmp_path, student.replace("TEACHER", mixture))
    init_students(spec)
    (made,) = (tmp_path / "students").glob("*/model")
    assert AutoModelForCausalLM.from_pretrained(made).config.model_type == model_type


def test_two_dense_models_become_a_mixture(tmp_path: Path) -> None:
    init_students(recipe(tmp_path, f"{{from: {DENSE}, with: [{DENSE}]}}"))
    (made,) = (tmp_path / "students").glob("*/model")
    model = AutoModelForCausalLM.from_pretrained(made)
    assert model.config.num_local_experts == 2
    experts = model.model.layers[0].mlp.experts.gate_up_proj
    assert torch.equal(experts[0], experts[1])


def test_too_little_text_is_refused_with_the_numbers(tmp_path: Path) -> None:
    calibration = "calibration: {sources: [skills, chat], tokens: 90000}"
    spec = recipe(tmp_path, f"{{from: {DENSE}, shape: {{hidden_size: 16}}, {calibration}}}")
    with pytest.raises(UserError, match=r"source 'skills' has [\d,]+ tokens in 200 rows.*calibration.tokens=90,000 is 45,000"):
        init_students(spec)
