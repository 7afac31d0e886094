"""Generated sources: the same rows however they are made, made once, counted, and refused before the first step."""

from __future__ import annotations

import json
import os
import shutil
import signal
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from daekit.cli import main
from daekit.data.prompts import load_prompts
from daekit.errors import UserError
from daekit.generation import drafts as drafts_module
from daekit.generation.drafts import Counts, Draft, DraftStore, Judge, NearDuplicates
from daekit.generation.local import Sampling, generate
from daekit.generation.user_turn import UserTurn
from daekit.models.teacher_view import TEACHER_PROMPT_IDS
from daekit.recipe import load_recipe, stage_key
from daekit.recipe.generated import GeneratedSpec, PromptsSpec
from daekit.runtime import generated as runtime_generated
from daekit.runtime.data import DataBuilder, LossRule
from daekit.runtime.generated import find_sources
from daekit.runtime.models import ModelBuilder
from daekit.runtime.prepare import prepare
from tests.helpers import tiny
from tests.helpers.judge_server import JudgeServer, closed_url
from tests.helpers.processes import forked, start_ranks, status_of
from tests.helpers.recipes import errors
from tests.helpers.score_server import ScoreServer

# the user's turn opens with a word of its own and ends with the end of text
TEMPLATE = (
    "{% for message in messages %}{{ 'w0 ' if message['role'] == 'user' else 'w1 ' }}{{ message['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}w1 {% endif %}"
)
RECIPE = """\
name: rows
output_dir: FOLDER/run
sources:
  own:
    domain: general
    generated: {model: FOLDER/model, prompts: self, rows: 12, max_new_tokens: 12, temperature: 1.5, batch_size: 4}
  asked:
    domain: shop
    generated: {model: FOLDER/model, prompts: {path: FOLDER/prompts.jsonl}, max_new_tokens: 12, temperature: 0,
                keep_unfinished: true}
stages:
  base:
    type: sft
    student: FOLDER/model
    data: [own, asked]
    trainer: {max_steps: 2, per_device_train_batch_size: 2, learning_rate: 0.01, gradient_checkpointing: false,
              save_strategy: "no", max_length: 96}
"""


def save_model(folder: Path, seed: int = 3, template: str | None = TEMPLATE) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    tiny.model(seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and prompts, some as messages with an answer, which is not read."""
    folder = tmp_path_factory.mktemp("world")
    save_model(folder / "model")
    prompts = [{"messages": [{"role": "user", "content": f"w{at} w{at + 3}"}]} for at in range(5)]
    prompts[0]["messages"].append({"role": "assistant", "content": "w39"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return folder


@pytest.fixture
def recipe(world: Path, tmp_path: Path) -> Path:
    """The recipe, with an output directory of its own."""
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("FOLDER/run", str(tmp_path / "run")).replace("FOLDER", str(world)))
    return path


def write(recipe: Path, *arguments: str) -> dict[str, bytes]:
    """``daekit generate``; source -> its rows. Of a source that was written twice, the newest."""
    assert main(["generate", str(recipe), *arguments]) == 0
    return rows_in(recipe)


def rows_in(recipe: Path) -> dict[str, bytes]:
    files = sorted((recipe.parent / "run" / "generated").glob("*/rows.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    return {path.parent.name.rpartition("-")[0]: path.read_bytes() for path in files}


def parsed(rows: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.splitlines()]


def fails(recipe: Path, *arguments: str, command: str = "generate") -> str:
    with pytest.raises(UserError) as caught:
        from daekit.cli import parse

        options = parse([command, str(recipe), *arguments])
        options.run(options)
    return str(caught.value)


# ---- the same rows ---------------------------------------------------------------------------------------------------


def test_the_batch_size_decides_nothing(recipe: Path) -> None:
    rows = write(recipe)
    assert len(parsed(rows["own"])) == 12 and len({json.dumps(row) for row in parsed(rows["own"])}) == 12
    files = [*(recipe.parent / "run" / "generated").glob("own-*/*")]
    for size in (1, 7, 40):
        for file in files:
            file.unlink()
        assert write(recipe, "own", f"sources.own.generated.batch_size={size}")["own"] == rows["own"]
    assert write(recipe, "own", "sources.own.generated.seed=1")["own"] != rows["own"]


def test_greedy_answers_are_those_of_a_loop_over_the_model(world: Path, recipe: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(world / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    rows = parsed(write(recipe, "asked")["asked"])
    assert [row["prompt"][0]["content"] for row in rows] == [f"w{at} w{at + 3}" for at in range(5)]
    for row in rows:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        start = len(ids)
        while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1, : len(tiny.WORDS)].argmax())]
        assert row["completion"][0]["content"] == tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_killed_and_gone_on_with_is_the_straight_run(recipe: Path, at: int, torn: bool) -> None:
    def killed() -> None:
        append, calls = drafts_module.append_json_lines, []

        def kill(path: Path, entries: list[Any]) -> None:
            if len(calls) == at:
                if torn:
                    path.open("a").write(json.dumps(entries[0])[:40])
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(0)
            append(path, entries)

        drafts_module.append_json_lines = kill  # type: ignore[assignment]
        write(recipe, "own")

    assert forked(killed) == -signal.SIGKILL
    attempts = recipe.parent / "run" / "generated"
    kept = sum(len(DraftStore(path).attempts) for path in attempts.glob("own-*/attempts.jsonl"))
    assert kept == 4 * at and not rows_in(recipe)
    resumed = write(recipe, "own")["own"]
    for path in attempts.glob("own-*/*"):
        path.unlink()
    assert write(recipe, "own")["own"] == resumed


def test_more_rows_go_on_from_those_that_are_there(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = write(recipe, "own", "sources.own.generated.rows=5")["own"]
    written: list[int] = []
    add = DraftStore.add
    monkeypatch.setattr(DraftStore, "add", lambda self, judged: (written.append(len(self.attempts)), add(self, judged))[1])
    many = write(recipe, "own")["own"]
    assert many.startswith(few) and len(parsed(few)) == 5 and min(written) > 0
    monkeypatch.setattr(runtime_generated, "load_model", None)  # fewer again: no model is needed
    assert write(recipe, "own", "sources.own.generated.rows=5")["own"] == few


# ---- made once -------------------------------------------------------------------------------------------------------


def test_rows_are_written_once_until_what_decides_them_changes(recipe: Path, world: Path, monkeypatch, capsys) -> None:
    loads: list[str] = []
    load = runtime_generated.load_model
    monkeypatch.setattr(runtime_generated, "load_model", lambda spec: (loads.append(spec.path), load(spec))[1])
    rows = write(recipe)
    assert len(loads) == 2 and write(recipe) == rows and len(loads) == 2
    assert "complete, kept" in capsys.readouterr().out
    other = recipe.parent / "other"  # the same bytes at another path are the same model; a retrained one is another
    save_model(other)
    assert write(recipe, f"sources.own.generated.model={other}") == rows and len(loads) == 2
    save_model(other, seed=4)
    assert write(recipe, "own", f"sources.own.generated.model={other}")["own"] != rows["own"] and len(loads) == 3
    done = next((recipe.parent / "run" / "generated").glob("asked-*/source.json"))
    facts = json.loads(done.read_text())
    assert facts["counts"]["attempts"] == 5 and facts["facts"]["model"]["files"] and facts["versions"]["daekit"]
    done.with_name("rows.jsonl").write_text("{}\n")
    assert "has changed since it was written" in fails(recipe)


def test_a_stage_learns_from_rows_that_the_stage_before_it_has_written(recipe: Path, capsys) -> None:
    text = recipe.read_text() + textwrap.dedent("""\
      second:
        type: dae
        teachers: {shop: labels}
        data: [again, asked]
        trainer: {max_steps: 1, per_device_train_batch_size: 2, gradient_checkpointing: false, save_strategy: "no",
                  max_length: 96, learning_rate: 0.01}
    evaluation: {}
    """)
    text = text.replace(
        "sources:\n",
        (
            "sources:\n  again:\n    domain: general\n    holdout: 2\n"
            "    generated: {model: stage:base, prompts: self, rows: 8, max_new_tokens: 12}\n"
        ),
    )
    recipe.write_text(text)
    assert main(["check", str(recipe), "--deep"]) == 0
    said = capsys.readouterr().out
    assert "its rows of again, asked are still to be written" in said and not (recipe.parent / "run").exists()
    assert main(["generate", str(recipe)]) == 0
    assert "[again] needs the stage 'base'" in capsys.readouterr().out and "again" not in rows_in(recipe)
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert len(parsed(rows_in(recipe)["again"])) == 8 and "again (general): 6 of 6 rows" in said
    assert main(["train", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert said.count("complete, kept") == 3 and "attempts" not in said
    loaded = load_recipe(recipe)
    assert stage_key(loaded, "second")["stages"].keys() == {"base"}
    assert "temperature" in fails(recipe, "sources.again.generated.temperature=0.5", command="train")


def test_a_larger_batch_is_the_same_stage_and_another_draw_another(recipe: Path) -> None:
    key = stage_key(load_recipe(recipe), "base")
    assert (
        stage_key(load_recipe(recipe, ["sources.own.generated.batch_size=9", "sources.own.generated.attempts=999"]), "base")
        == key
    )
    for change in ("seed=1", "rows=13", "top_p=0.9", "matching=w1", "prompts=bos", "model=elsewhere/model"):
        assert stage_key(load_recipe(recipe, [f"sources.own.generated.{change}"]), "base") != key


# ---- what a stage is asked once its rows are there -------------------------------------------------------------------


@pytest.mark.parametrize("full", ["before", "after"])
def test_a_disk_that_is_too_small_is_told_before_the_rows_and_once_they_are_there(
    recipe: Path, full: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(recipe.parent)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage._replace(free=1000) if full == "before" or rows_in(recipe) else usage
    )
    assert "free some space" in fails(recipe, command="train")
    assert len(rows_in(recipe)) == (0 if full == "before" else 2)
    assert not (recipe.parent / "run" / "stages" / "base").exists()


def test_a_served_teacher_is_asked_before_the_rows_and_about_the_longest_of_them(recipe: Path, capsys) -> None:
    with ScoreServer(tiny.model(seed=4), _with(TEMPLATE)) as server:
        stage = [f"stages.base.{key}" for key in ("type=kd", f"teacher={{base_url: '{server.url}', model: big, k: 5}}")]
        server.tokenizer = tiny.swapped_tokenizer()
        assert "its tokenizer is not the student's" in fails(recipe, *stage, command="train") and not rows_in(recipe)
        assert [type(call["prompt"]) for call in server.calls] == [str]
        server.tokenizer, server.max_logprobs = _with(TEMPLATE), 3
        server.calls.clear()
        message = fails(recipe, *stage, command="train")
        assert "stages.base.teacher" in message and "max allowed: 3" in message and len(rows_in(recipe)) == 2
        assert not (recipe.parent / "run" / "stages" / "base").exists()
        server.max_logprobs = 5
        assert main(["train", str(recipe), *stage]) == 0


def test_what_a_user_should_know_of_written_rows_is_said(recipe: Path, tmp_path: Path, capsys) -> None:
    tiny.rows(4).remove_columns("domain").to_json(tmp_path / "plain.jsonl")
    text = recipe.read_text().replace("sources:\n", f"sources:\n  plain: {{domain: shop, path: {tmp_path}/plain.jsonl}}\n")
    recipe.write_text(text.replace("data: [own, asked]", "data: [own, asked, plain]"))
    assert main(["train", str(recipe)]) == 0
    assert "note: stages.base: the prompts of plain are joined as they are" in capsys.readouterr().out


def test_a_student_is_cut_with_rows_that_are_written_before(recipe: Path, world: Path) -> None:
    student = f"{{from: {world}/model, shape: {{num_hidden_layers: 1}}, calibration: {{tokens: TOKENS, sources: [own]}}}}"
    arguments = ["stages.base.data=[asked]", f"stages.base.student={student}"]
    message = fails(recipe, *(each.replace("TOKENS", "9000") for each in arguments), command="train")
    assert "calibration text too short" in message and len(rows_in(recipe)) == 2
    assert not (recipe.parent / "run" / "students").exists()
    assert main(["train", str(recipe), *(each.replace("TOKENS", "64") for each in arguments)]) == 0


@pytest.mark.slow
def test_two_ranks_write_once_and_train_as_one_process(recipe: Path, world: Path, tmp_path: Path) -> None:
    trained = ["stages.base.data=[asked]", "stages.base.trainer.optim=sgd", "stages.base.trainer.learning_rate=0.1"]
    ranks = [f"output_dir={tmp_path}/ranks", "stages.base.trainer.per_device_train_batch_size=1"]
    outputs = [tmp_path / "0.txt", tmp_path / "1.txt"]
    started = start_ranks(lambda: main(["train", str(recipe), *trained, *ranks]), outputs)
    assert [status_of(each) for each in started] == [0, 0], outputs[0].read_text() + outputs[1].read_text()
    assert ["5 rows of 5 attempts" in output.read_text() for output in outputs] == [True, False]
    assert main(["train", str(recipe), *trained]) == 0
    (written,) = (tmp_path / "ranks" / "generated").glob("*/rows.jsonl")
    assert written.read_bytes() == rows_in(recipe)["asked"]
    start = load_file(world / "model" / "model.safetensors")
    one, two = (load_file(tmp_path / name / "stages" / "base" / "model" / "model.safetensors") for name in ("run", "ranks"))
    moved = sum(float((one[name] - start[name]).norm()) for name in one)
    apart = sum(float((one[name] - two[name]).norm()) for name in one)
    assert one.keys() == two.keys() and moved > 0.01 and apart < 1e-4 * moved


def test_a_checkpoint_that_the_written_rows_do_not_reach_is_told_before_the_first_step(recipe: Path) -> None:
    recipe.write_text(
        recipe.read_text().replace('save_strategy: "no"', "save_steps: 5").replace("max_steps: 2", "num_train_epochs: 1")
        + "evaluation: {models: [{name: early, stage: base, checkpoint: 70}], sources: [own]}\n"
    )
    message = fails(recipe, "sources.own.holdout=2", command="train")
    assert "stage 'base' will have no checkpoint-70" in message and "evaluation.models.early" in message
    assert len(rows_in(recipe)) == 2 and not (recipe.parent / "run" / "stages" / "base").exists()


# ---- judged and counted ----------------------------------------------------------------------------------------------


def spec_of(**fields: Any) -> GeneratedSpec:
    return GeneratedSpec.model_validate({"model": "some/model", "prompts": "bos", "rows": 3} | fields)


def draft(text: str, fate: str = "written", tokens: int = 5) -> Draft:
    return Draft({"text": text}, text, tokens, fate)


def test_every_attempt_has_one_fate() -> None:
    judge, counts = Judge(spec_of(min_tokens=3, matching="a", near_duplicates=0.6)), Counts()
    long = "a b c d e f g h i j"
    drafts = [
        *(draft(long), draft(long), draft(long + " k"), draft("a quite different text a"), draft("b"), draft("a", tokens=2)),
        *(draft(" ", "empty"), draft("a cut", "unfinished"), Draft(None, "", 9, "open_turn")),
    ]
    for each in drafts:
        counts.add(judge(each))
    assert dict(counts.fates) == {
        **{"kept": 2, "duplicate": 1, "near_duplicate": 1, "unmatched": 1, "short": 1, "empty": 1, "unfinished": 1},
        "open_turn": 1,
    }
    assert counts.attempts == sum(counts.fates.values()) == len(drafts)
    assert Judge(spec_of(keep_unfinished=True))(draft("a cut", "unfinished"))["fate"] == "kept"


def test_near_duplicates_are_those_of_a_comparison_of_all_with_all() -> None:
    import random

    rng = random.Random(0)
    texts = [" ".join(f"w{rng.randrange(30)}" for _ in range(40)) for _ in range(30)]
    for text in texts[:30]:
        words = text.split()
        for at in rng.sample(range(40), rng.randrange(1, 6)):
            words[at] = "new"
        texts.append(" ".join(words))

    def runs(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return set(zip(words, words[1:], words[2:], strict=False))

    found, exact = [], []
    near = NearDuplicates(0.7)
    for at, text in enumerate(texts):
        found.append(text in near)
        exact.append(any(len(runs(text) & runs(t)) >= 0.7 * len(runs(text) | runs(t)) for t in texts[:at]))
        near.add(text)
    assert not any(f and not e for f, e in zip(found, exact, strict=True))  # exactly looked at
    assert 5 < sum(exact) < 30 and sum(found) >= 0.9 * sum(exact)


def test_rows_of_a_fixed_model_are_counted_in_the_facts(recipe: Path, capsys) -> None:
    rows = parsed(
        write(
            recipe,
            "asked",
            "sources.asked.generated.rows=5",
            "sources.asked.generated.keep_unfinished=false",
            "sources.asked.generated.temperature=2",
            "sources.asked.generated.attempts=200",
        )["asked"]
    )
    out = capsys.readouterr().out
    facts = json.loads(next((recipe.parent / "run" / "generated").glob("asked-*/source.json")).read_text())["counts"]
    assert facts["kept"] == len(rows) == 5 and facts["unfinished"] > 0
    assert facts["attempts"] == sum(facts.get(fate, 0) for fate in ("kept", *drafts_module._WORDS))
    assert f"5 rows of {facts['attempts']} attempts" in out and f"{facts['unfinished']} without end" in out


def test_texts_begin_with_nothing(recipe: Path) -> None:
    rows = parsed(write(recipe, "own", "sources.own.generated.prompts=bos", "sources.own.generated.max_new_tokens=40")["own"])
    assert len(rows) == 12 and all(row.keys() == {"text"} and row["text"].strip() for row in rows)


@pytest.mark.parametrize("prompts", ["messages", "strings", "bos"])
@pytest.mark.parametrize("everything", [False, True])
def test_the_end_of_an_answer_that_was_cut_carries_no_loss(
    recipe: Path, tmp_path: Path, prompts: str, everything: bool
) -> None:
    rule = ["stages.base.trainer.completion_only_loss=false"] if everything else []
    given = [f"sources.asked.generated.{key}" for key in ("temperature=2", "seed=3", "rows=40", "max_new_tokens=9")]
    if prompts == "strings":
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w{at} w9 "}) + "\n" for at in range(5)))
        given.append(f"sources.asked.generated.prompts={{path: {tmp_path}/prompts.jsonl}}")
    if prompts == "bos":
        given.append("sources.asked.generated.prompts=bos")
    rows = parsed(write(recipe, "asked", *given)["asked"])
    loaded = load_recipe(recipe, [*given, *rule])
    data = DataBuilder(loaded)
    find_sources(ModelBuilder(data))
    tokenised = data.tokenized("asked", LossRule.of(loaded.stages["base"]))[0]
    ends = []
    for row, tokens in zip(rows, tokenised, strict=True):
        assert row.get("unfinished", True) is True
        ended = [token for token in tokens["input_ids"] if token == data.tokenizer.eos_token_id]
        assert tokens["input_ids"][-1] == data.tokenizer.eos_token_id and ended
        loss = [token for token in tokens["labels"] if token >= 0]
        ends.append(loss[-1] == data.tokenizer.eos_token_id)
        words = data.tokenizer.decode([token for token in loss if token != data.tokenizer.eos_token_id])
        answer = row["text"] if prompts == "bos" else row["completion"]
        assert words.endswith(answer if isinstance(answer, str) else answer[0]["content"])
    assert ends == ["unfinished" not in row for row in rows] and len(set(ends)) == 2


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9])
def test_top_p_draws_among_the_likeliest_that_together_have_it(top_p: float) -> None:
    model, tokenizer, prompt = tiny.model(seed=4).eval(), tiny.tokenizer(), [5, 6, 7]
    with torch.no_grad():
        probabilities = model(input_ids=torch.tensor([prompt])).logits[0, -1, : len(tiny.WORDS)].double().softmax(-1)
    values, order = probabilities.sort(descending=True)
    nucleus = order[: int((values.cumsum(0) < top_p).sum()) + 1]
    expected = torch.zeros_like(probabilities).index_copy(0, nucleus, probabilities[nucleus] / probabilities[nucleus].sum())
    count = 2000
    draws = [Sampling(1, 1.0, (at,), top_p) for at in range(count)]
    answers = generate(model, tokenizer, [prompt] * count, max_new_tokens=1, batch_size=1000, sampling=draws)
    drawn = torch.bincount(torch.tensor([answer[0] if answer else 1 for answer in answers]), minlength=len(expected))
    assert set(drawn.nonzero().flatten().tolist()) <= set(nucleus.tolist())
    assert (drawn / count - expected).abs().max() < 4 * 0.5 / count**0.5


def test_a_nucleus_wider_than_what_is_sorted_first_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from daekit.generation import local

    probability = torch.rand(3, 500, dtype=torch.float64).softmax(-1)
    top_p = torch.tensor([[0.9], [1.0], [0.3]], dtype=torch.float64)
    whole = local._nucleus(probability, top_p)
    monkeypatch.setattr(local, "_NUCLEUS", 4)
    assert torch.equal(local._nucleus(probability, top_p), whole)
    assert torch.equal(whole[1], probability[1]) and (whole[0] > 0).sum() < 500


# ---- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (tiny.CHAT_TEMPLATE, "ends the user's turn with ordinary text"),
        ("{% for m in messages %}{{ m['content'] }} </s>{% endfor %}", "does not open the user's turn"),
        ("w0 {{ messages | length }} </s>", "does not open the user's turn"),
        ("{{ raise_exception('no') }}", "takes no user's turn alone"),
        (None, "the model's tokenizer has none"),
    ],
)
def test_a_user_turn_that_cannot_be_opened_is_told_before_the_first_step(
    recipe: Path, tmp_path: Path, template: str | None, reason: str
) -> None:
    save_model(tmp_path / "model", template=template)
    arguments = [f"sources.own.generated.model={tmp_path / 'model'}", f"stages.base.student={tmp_path / 'model'}"]
    for command in ("generate", "train"):
        message = fails(recipe, *arguments, command=command)
        assert reason in message and "sources.own" in message
    assert not (recipe.parent / "run" / "generated").exists()


def test_the_user_turn_of_real_template_forms_is_found() -> None:
    turn, tokenizer = UserTurn.of(_with(TEMPLATE), "here"), tiny.tokenizer()
    assert tokenizer.decode(turn.opening) == "w0" and turn.end == tokenizer.eos_token_id


def _with(template: str) -> Any:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("change", ["own", "asked"])
def test_a_model_that_never_ends_is_told_after_few_attempts(recipe: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daekit.generation.writing._HOPELESS", 8)
    arguments = [
        f"sources.{change}.generated.{key}"
        for key in ("max_new_tokens=1", "rows=100", "temperature=1", "keep_unfinished=false")
    ]
    message = fails(recipe, change, *arguments)
    assert "none of the first 8 attempts is a row" in message and "max_new_tokens=" in message
    monkeypatch.setattr(runtime_generated, "load_model", None)  # told again without a model
    assert message == fails(recipe, change, *arguments)


def test_too_few_rows_are_an_error_and_stay(recipe: Path) -> None:
    message = fails(
        recipe,
        "asked",
        "sources.asked.generated.rows=50",
        "sources.asked.generated.attempts=60",
        "sources.asked.generated.temperature=0.01",
    )
    assert "60 attempts gave" in message and "duplicates" in message and "Raise temperature" in message


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["sources.asked.generated.rows=6"], "6 rows of 5 prompts at temperature 0"),
        (["sources.asked.generated.max_new_tokens=300"], "is more than the 256 that the model reads"),
        (["stages.base.trainer.max_length=16"], "may have"),
        (
            ["sources.asked.generated.model={url: 'http://127.0.0.1:9/v1', served_model: m, api_key_env: PATH}"],
            "does not look like the name of a key",
        ),
        (
            ["sources.asked.generated.model=http://127.0.0.1:9/v1#m", "sources.asked.generated.prompts.path=builtin:shop"],
            "an endpoint answers messages",
        ),
        (["sources.own.generated.model=elsewhere/model/of/none"], "does not exist"),
        (["sources.asked.holdout=5"], "sources.asked.holdout: 5 of the 5 rows that can be written at most"),
        (
            ["stages.base.data={sources: {own: 0.01, asked: 0.99}, rows: 12}"],
            "stages.base.data.own: a share of 0.01 of 12 rows is not one row",
        ),
        (["sources.own.generated.prompts=bos", "stages.base.trainer.assistant_only_loss=true"], "nobody is marked as"),
    ],
)
def test_what_can_be_known_is_told_before_a_model_is_loaded(
    recipe: Path, arguments: list[str], reason: str, monkeypatch
) -> None:
    monkeypatch.setattr(runtime_generated, "load_model", None)
    assert reason in fails(recipe, *arguments, command="train")
    assert not (recipe.parent / "run" / "generated").exists()


LATE = """\
name: late
output_dir: FOLDER/run
sources:
  shop: {domain: shop, path: FOLDER/shop.jsonl}
  late: {domain: general, generated: {model: "stage:base", prompts: bos, rows: 2, max_new_tokens: 9}}
stages:
  base: {type: sft, student: WORLD/model, data: [shop], trainer: &trainer {max_steps: 1, max_length: 300}}
  last: {type: kd, teacher: WORLD/model, data: [shop, late], trainer: *trainer}
"""


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        (
            "stages.last.loss={on_policy: 0.5}",
            "stages.last.data: on_policy_fraction=0.5 (on_policy): the rows of the generated",
        ),
        ("stages.last.data={shop: 0.99, late: 0.01}", "stages.last.data.late: a share of 0.01 of 9 rows is not one row"),
        (
            "stages.last.data={sources: {shop: 1, late: 1}, rows: 1000000000000}",
            "stages.last.data.rows: 1,000,000,000,000 rows",
        ),
        (
            "sources.late={domain: x, holdout: 3, generated: {model: 'stage:base', prompts: {source: shop}, temperature: 0, "
            "max_new_tokens: 9}}",
            "sources.late.holdout: 3 of the 3 rows",
        ),
    ],
)
def test_what_is_certain_of_rows_that_a_stage_writes_is_told_before_that_stage(
    override: str, reason: str, world: Path, tmp_path: Path
) -> None:
    rows = [{"prompt": f"w{at % 3}", "completion": f"w{at}"} for at in range(9)]
    (tmp_path / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "late.yaml").write_text(LATE.replace("FOLDER", str(tmp_path)).replace("WORLD", str(world)))
    prepare(load_recipe(tmp_path / "late.yaml"))
    message = fails(tmp_path / "late.yaml", override, command="train")
    assert reason in message and not (tmp_path / "run" / "stages").exists()


def test_a_name_that_is_no_generated_source_is_told(recipe: Path) -> None:
    assert "no generated source 'onw'" in (message := fails(recipe, "onw")) and "did you mean 'own'" in message


def test_probabilities_that_are_no_numbers_are_told(tmp_path: Path) -> None:
    model = tiny.model(seed=4).eval()
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        generate(model, tiny.tokenizer(), [[5, 6]], max_new_tokens=2, sampling=[Sampling(2, 1.0)])


SOURCES = """
name: x
output_dir: runs/x
sources:
  shop: {domain: shop, path: "builtin:shop"}
  made: {domain: general, generated: {model: some/model, prompts: self, rows: 5}}
stages:
  one: {type: sft, student: some/model, data: [shop]}
  two: {type: sft, data: [shop, made]}
"""


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("sources.made.path=builtin:shop", "excludes `path`"),
        ("sources.made.generated=null", "or give `generated` for rows that a model writes"),
        ("sources.made.generated.rows=null", "must say how many rows"),
        ("sources.made.generated.temperature=0", "all rows would be the same"),
        ("sources.made.generated.model=stage:two", "'two' is not complete then"),
        ("sources.made.generated.model=stage:tow", "there is no stage 'tow'"),
        ("sources.made.generated.model={config: {model_type: mistral}}", "have nothing to write"),
        ("sources.made.generated.model=https://host/v1#m", "needs a model here"),
        ("sources.made.generated.model=https://host/v1", "name the endpoint's model"),
        ("sources.made.generated.prompts={source: made}", "no source that is not generated 'made'"),
        ("sources.made.generated.prompts={source: shop, path: x.jsonl}", "must be exactly one of"),
        ("sources.made.generated.prompts={written: bos, max_new_tokens: 9}", "belongs to `written: self`"),
        ("sources.made.generated.prompts={written: self, chat: true}", "belongs to `path`"),
        (
            "sources.made.generated.prompts='builtin:shopp'",
            "is not an embedded corpus (skills, chat and shop); did you mean 'shop'",
        ),
        (
            "sources.made.generated.prompts={path: 'builtin:shop', columns: {completion: answer}}",
            "only prompt and messages are read",
        ),
        ("sources.made.generated.matching='('", "no regular expression"),
        ("sources.made.generated.near_duplicates=1.5", "must be below 1"),
        ("sources.made.generated.top_p=0", "must be greater than 0"),
        ("sources.made.holdout=5", "5 of the 5 rows that are written leave none to train on"),
        ("sources.made.chat=true", "belongs to `path`"),
        ("tokenizer={train: {vocab_size: 300, sources: [made]}}", "not written yet when the tokenizer is trained"),
    ],
)
def test_what_contradicts_itself_is_told_with_its_key(override: str, reason: str) -> None:
    assert [line for line in errors(SOURCES, override) if reason in line], errors(SOURCES, override)


def test_a_prompt_may_be_made_of_several_columns(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"page": "Blue.", "question": "Which?", "number": 3}) + "\n")
    prompts = load_prompts("here", PromptsSpec(path=str(file), columns={"prompt": "{page}\n\n{question}"}, chat=True))
    assert prompts == [{"prompt": [{"role": "user", "content": "Blue.\n\nWhich?"}]}]
    with pytest.raises(UserError, match=r"here: .*line 1 has int 3 as number, which columns sets into a text"):
        load_prompts("here", PromptsSpec(path=str(file), columns={"prompt": "{number}"}))


# ---- served ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["{source: given}", "{path: FOLDER/given.jsonl}"])
def test_what_a_teacher_is_told_beside_a_prompt_is_kept(recipe: Path, world: Path, tmp_path: Path, of: str) -> None:
    user, answer = ({"role": role, "content": "w7"} for role in ("user", "assistant"))
    told = [{"role": "user", "content": "w8 w9"}]
    given = [{"prompt": [user], "completion": [answer], "teacher_prompt": told}, {"prompt": [user], "completion": [answer]}]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    overrides = [
        f"sources.given={{domain: shop, path: {tmp_path}/given.jsonl}}",
        f"sources.asked.generated.prompts={of.replace('FOLDER', str(tmp_path))}",
        f"stages.base={{type: kd, student: {world}/model, teacher: {world}/model, data: [asked], trainer: {{max_length: 96}}}}",
    ]
    rows = parsed(write(recipe, "asked", *overrides)["asked"])
    assert [row.get("teacher_prompt") for row in rows] == [told, None]
    trained = prepare(load_recipe(recipe, overrides)).stages["base"].mixture.dataset
    assert sorted(len(row) > 0 for row in trained[TEACHER_PROMPT_IDS]) == [False, True]


def test_an_endpoint_writes_and_is_asked_once(recipe: Path, capsys) -> None:
    with JudgeServer() as server:
        arguments = ["asked", f"sources.asked.generated.model={server.url}#m", "sources.asked.generated.seed=7"]
        rows = parsed(write(recipe, *arguments)["asked"])
        asked = [call.body for call in server.calls]
        assert len(asked) == 5 == len(rows) and {body["seed"] for body in asked} == {7, 8, 9, 10, 11}
        assert all(body["max_tokens"] == 12 and body["messages"][-1]["role"] == "user" for body in asked)
        assert "are other tokens" in capsys.readouterr().out  # its words are none of the tokenizer's
        write(recipe, *arguments)
        assert server.got == ["/v1/models"], "once before the first row, and never once they are written"
        next((recipe.parent / "run" / "generated").glob("asked-*/source.json")).unlink()
        next((recipe.parent / "run" / "generated").glob("asked-*/attempts.jsonl")).unlink()
        assert parsed(write(recipe, *arguments)["asked"]) == rows and len(server.calls) == 5


def test_an_endpoint_that_cannot_be_asked_is_told_before_the_first_stage(recipe: Path) -> None:
    url = closed_url()
    at = f"sources.asked.generated.model={{url: '{url}', served_model: m"
    assert f"model m at {url}: not reached (connection refused)" in fails(recipe, "--deep", f"{at}}}", command="check")
    assert "api_key_env: UNSET_API_KEY is not set" in fails(
        recipe, "--deep", f"{at}, api_key_env: UNSET_API_KEY}}", command="check"
    )


def test_an_endpoint_that_does_not_answer_all_is_told_and_asked_for_the_rest(recipe: Path) -> None:
    broken = [True]

    def refuse(call: Any) -> str | None:
        return "400" if broken[0] and call.number >= 3 else None

    with JudgeServer(refuse) as server:
        arguments = ["asked", f"sources.asked.generated.model={server.url}#m"]
        assert "did not answer every prompt" in fails(recipe, *arguments)
        broken[0] = False
        assert len(parsed(write(recipe, *arguments)["asked"])) == 5
