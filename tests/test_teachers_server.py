"""A teacher behind a server that scores prompts says what the model says; a server that is not what it seems is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from daekit.errors import UserError
from daekit.losses import Objective, prediction_loss
from daekit.models.heads import teacher_log_probs
from daekit.protocol import OutputHead, TeacherOutput
from daekit.recipe import load_recipe_text, stage_key
from daekit.runtime.prepare import prepare
from daekit.runtime.run import cache_teachers, run_recipe
from daekit.teachers import CachedTeacher, EnsembleTeacher, ModelTeacher, RoutedTeacher, ServerTeacher, write_cache
from daekit.teachers.cache.rows import rows_of_examples
from daekit.teachers.parts import require_served
from daekit.trainers import KDConfig, KDTrainer
from tests.helpers import tiny
from tests.helpers.batches import collate
from tests.helpers.cache_cases import V, batch_to, bytes_of, long_rows
from tests.helpers.cache_world import build_world
from tests.helpers.score_server import ScoreServer

K = 12
TEACHER = tiny.model(seed=2, hidden=48)


@pytest.fixture
def server() -> Iterator[ScoreServer]:
    with ScoreServer(TEACHER, tiny.tokenizer()) as server:
        yield server


def teacher_at(server: ScoreServer, k: int = K, **options: Any) -> ServerTeacher:
    return ServerTeacher(server.url, "big", V, k, first_wait=0.01, **{"max_retries": 2, "timeout": 5.0} | options)


def local_top_k(batch: Any, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities) of the K most likely tokens with the label, of the model itself."""
    (output,) = ModelTeacher(TEACHER, V).outputs(batch)
    log_probs = teacher_log_probs(output, slice(None))
    forced = log_probs.scatter(-1, batch.labels_N[:, None], torch.inf)
    ids = forced.topk(k, -1).indices.sort(-1).values
    return ids, log_probs.gather(-1, ids)


def loss_of(output: TeacherOutput, labels: torch.Tensor, **objective: Any) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(len(labels), 6, generator=generator).requires_grad_(True)
    head = OutputHead(torch.randn(V, 6, generator=generator), None, V)
    sums = prediction_loss(hidden, head, labels, [output], Objective(**objective))
    sums.loss.backward()
    return sums.loss.detach(), hidden.grad  # type: ignore[return-value]


@pytest.mark.parametrize("layout", ["right", "blocks"])
def test_its_top_k_is_that_of_the_model_it_serves(layout: str, server: ScoreServer) -> None:
    batch = collate(long_rows(8, longest=20), layout)
    (output,) = teacher_at(server).outputs(batch)
    assert output.top_k is not None and output.top_k.tail_log_mass_M is not None
    ids, log_probs = local_top_k(batch, K)
    assert torch.equal(output.top_k.ids_MK, ids) and (output.top_k.ids_MK == batch.labels_N[:, None]).any(-1).all()
    torch.testing.assert_close(output.top_k.log_probs_MK, log_probs, rtol=0, atol=2e-5)
    tail = torch.log1p(-log_probs.double().exp().sum(-1)).float()
    torch.testing.assert_close(output.top_k.tail_log_mass_M, tail, rtol=0, atol=1e-3)
    assert all(call["prompt_logprobs"] == K and call["max_tokens"] == 1 for call in server.calls)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_all_tokens_give_the_loss_and_gradient_of_the_model(divergence: str, server: ScoreServer) -> None:
    server.max_logprobs = V
    batch = batch_to(long_rows(4, longest=20))
    outputs = (ModelTeacher(TEACHER, V).outputs(batch)[0], teacher_at(server, 2 * V).outputs(batch)[0])
    live, served = (loss_of(output, batch.labels_N, divergence=divergence) for output in outputs)
    for a, b in zip(live, served, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_cache_from_a_server_is_that_of_the_model(server: ScoreServer, tmp_path: Path) -> None:
    rows = long_rows(20)
    write_cache(teacher_at(server), rows, tmp_path / "server", keep="top_k", k=K, shard_bytes=4000, tokenizer=tiny.tokenizer())
    write_cache(ModelTeacher(TEACHER, V), rows, tmp_path / "model", keep="top_k", k=K, tokenizer=tiny.tokenizer())
    batch = batch_to(rows)
    served, local = (CachedTeacher(tmp_path / name).outputs(batch)[0].top_k for name in ("server", "model"))
    assert served is not None and local is not None and torch.equal(served.ids_MK, local.ids_MK)
    torch.testing.assert_close(served.log_probs_MK, local.log_probs_MK, rtol=2e-3, atol=1e-5)
    asked = len(server.calls)
    write_cache(teacher_at(server), rows, tmp_path / "server", keep="top_k", k=K, tokenizer=tiny.tokenizer())
    assert len(server.calls) == asked + 1  # whether it is the same teacher, and no row again


def test_a_cache_that_was_stopped_by_the_server_asks_only_what_is_missing(tmp_path: Path) -> None:
    rows, wanted = long_rows(24), dict(keep="top_k", k=K, shard_bytes=4000, tokenizer=tiny.tokenizer())
    said = r"teacher big at .*HTTP 500: .*overloaded.*What is complete is kept"
    stopped = ScoreServer(TEACHER, tiny.tokenizer(), lambda number: "500" if number >= 12 else None)
    with stopped as server, pytest.raises(UserError, match=said):
        write_cache(teacher_at(server, max_retries=1), rows, tmp_path / "a", **wanted)  # type: ignore[arg-type]
    with ScoreServer(TEACHER, tiny.tokenizer()) as server:
        write_cache(teacher_at(server), rows, tmp_path / "a", **wanted)  # type: ignore[arg-type]
        again = len(server.calls)
        write_cache(teacher_at(server), rows, tmp_path / "b", **wanted)  # type: ignore[arg-type]
        assert again < len(server.calls) - again
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("fault", ["500", "429", "half", "half of the rows", "no scores", "hang"])
def test_what_fails_in_passing_is_asked_again(fault: str, server: ScoreServer) -> None:
    server.misbehave = lambda number: fault if number % 2 == 0 and number < 6 else None
    batch = batch_to(long_rows(5, longest=20))
    (output,) = teacher_at(server, timeout=0.5, max_retries=6).outputs(batch)
    assert output.top_k is not None and torch.equal(output.top_k.ids_MK, local_top_k(batch, K)[0])
    assert len(server.calls) == 5 + 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("500", r"HTTP 500: .*overloaded"),
        ("half", "its answer holds no prompt_logprobs"),
        ("half of the rows", r"it scores \d+ of \d+ tokens"),
        ("hang", "no whole reply within timeout=0.2 seconds"),
        ("shifted", r"does not hold that token itself .* shifted, or"),
        ("nan", "are not finite"),
        ("raw_logits", "sum to .* raw_logprobs"),
        ("fewer", r"names 5 tokens for .*k is 12\. .*--max-logprobs"),
    ],
)
def test_what_fails_for_good_is_one_error(fault: str, said: str, server: ScoreServer) -> None:
    server.misbehave, server.max_logprobs = lambda number: fault, 20 if fault != "fewer" else 4
    with pytest.raises(UserError, match=rf"teacher big at http://127.*{said}"):
        teacher_at(server, max_retries=1, timeout=0.2 if fault == "hang" else 5.0).outputs(batch_to(long_rows(3, longest=20)))


@pytest.mark.parametrize("says_ids", [True, False])
def test_the_tokenizer_of_the_server_is_compared(says_ids: bool, server: ScoreServer) -> None:
    server.says_ids = says_ids
    rows = list(rows_of_examples(long_rows(3)))
    teacher_at(server).require_served(Objective(), tiny.tokenizer(), rows)
    server.tokenizer = tiny.swapped_tokenizer()
    with pytest.raises(UserError, match=r"its tokenizer is not the student's: .*first different at token"):
        teacher_at(server).require_served(Objective(), tiny.tokenizer(), rows)


def test_the_preflight_asks_about_the_longest_row_once(server: ScoreServer) -> None:
    rows = list(rows_of_examples(long_rows(9)))
    teacher = teacher_at(server)
    for _ in range(2):
        teacher.require_served(Objective(), tiny.tokenizer(), rows)
    assert [len(call["prompt"]) for call in server.calls[1:]] == [max(len(row.input_ids) for row in rows)]
    server.max_model_len = 30
    with pytest.raises(UserError, match=r"maximum context length .*--max-model-len, or make the rows shorter"):
        teacher_at(server).outputs(batch_to(long_rows(9)))


@pytest.mark.parametrize(
    ("objective", "said"),
    [(dict(temperature=2.0), "temperature: "), (dict(hidden_weight=1.0), "attention_weight, hidden_weight: a server")],
)
def test_losses_that_it_does_not_serve(objective: dict[str, Any], said: str, server: ScoreServer) -> None:
    with pytest.raises(UserError, match=said):
        require_served(teacher_at(server), Objective(**objective), tiny.tokenizer())
    assert server.calls == []
    with pytest.raises(UserError, match="an ensemble cannot hold a teacher that gives only its most likely tokens"):
        EnsembleTeacher([teacher_at(server), ModelTeacher(TEACHER, V)]).outputs(batch_to(long_rows(2)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(keep="hidden"), "Use keep: top_k"),
        (dict(keep="top_k", k=20), "gives sparse distributions, 12 tokens"),
        (dict(keep="top_k", k=K, temperature=2.0), "at temperature 2.0 was asked for"),
        (dict(keep="top_k", k=K, forced_ids=[1]), "forced_ids: "),
    ],
)
def test_caches_that_it_cannot_make(settings: dict[str, Any], said: str, server: ScoreServer, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        write_cache(teacher_at(server), long_rows(3), tmp_path, **settings)
    assert not (tmp_path / "facts.json").exists()


def test_settings_out_of_bounds() -> None:
    for url, k, said in (
        ("localhost:8000/v1", 20, "base_url: must begin"),
        ("http://127.0.0.1:1/v1", 1, "k: 1 leaves no room"),
    ):
        with pytest.raises(UserError, match=said):
            ServerTeacher(url, "big", V, k)
    with pytest.raises(UserError, match="another machine, and http sends"):
        ServerTeacher("http://gpu.example:8000/v1", "big", V)


def test_its_key_comes_from_the_environment(server: ScoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_API_KEY", "not-a-real-key")
    teacher_at(server, api_key_env="TEACHER_API_KEY").outputs(batch_to(long_rows(1)))
    assert server.keys == ["Bearer not-a-real-key"]
    with pytest.raises(UserError, match="is not sent to"):
        teacher_at(server, api_key_env="OPENAI_API_KEY")
    assert "not-a-real-key" not in str(teacher_at(server, api_key_env="TEACHER_API_KEY").identity())


def test_calls_run_at_once_and_equal_rows_are_asked_once(server: ScoreServer) -> None:
    rows = long_rows(12, longest=20)
    teacher_at(server, concurrency=4).outputs(batch_to([*rows, *rows[:3]]))
    different = {tuple(row["input_ids"]) for row in rows if any(label >= 0 for label in row["labels"][1:])}
    assert len(server.calls) == len(different) and 1 < server.most_at_once <= 4


def test_a_batch_without_loss_asks_nothing(server: ScoreServer) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [-100] * 3, "domain": "shop"}
    (output,) = teacher_at(server).outputs(batch_to([row]))
    assert output.positions_M.numel() == 0 and server.calls == []
    sums = prediction_loss(
        torch.zeros(0, 6), OutputHead(torch.zeros(V, 6), None, V), torch.zeros(0, dtype=torch.long), [output], Objective()
    )
    assert float(sums.loss) == 0.0


def test_it_trains_beside_a_local_teacher(server: ScoreServer, tmp_path: Path) -> None:
    args = dict(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to="none", save_strategy="no")
    args |= dict(gradient_checkpointing=False, disable_tqdm=True, logging_steps=1)
    routed = RoutedTeacher({"shop": teacher_at(server), "general": ModelTeacher(tiny.model(seed=3), V)})
    trainer = KDTrainer(tiny.model(seed=1), routed, KDConfig(**args), tiny.rows(12), tiny.tokenizer())  # type: ignore[arg-type]
    assert isinstance(server.calls[0]["prompt"], str)  # the preflight, when the trainer is made
    trainer.train()
    assert all(entry["kl/shop"] > 0 for entry in trainer.state.log_history if "kl/shop" in entry)
    assert trainer.teacher.identity()["shop"] == {"kind": "server", "model": "big", "k": K}


def test_what_the_student_writes_is_scored_as_by_the_model_itself(server: ScoreServer, tmp_path: Path) -> None:
    server.max_logprobs = V
    args = dict(
        max_steps=3, per_device_train_batch_size=4, report_to="none", save_strategy="no", optim="sgd", learning_rate=0.1
    )
    args |= dict(gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, on_policy_fraction=1.0, max_new_tokens=6)
    runs = []
    for number, teacher in enumerate((teacher_at(server, V), ModelTeacher(TEACHER, V))):
        config = KDConfig(output_dir=str(tmp_path / str(number)), **args)  # type: ignore[arg-type]
        trainer = KDTrainer(tiny.model(seed=1), teacher, config, tiny.rows(12), tiny.tokenizer())
        trainer.train()
        runs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(runs[0]) == 3 and runs[0] == pytest.approx(runs[1], rel=1e-5)
    sent = [tuple(call["prompt"]) for call in server.calls if not isinstance(call["prompt"], str)]
    assert len({*sent} - {*map(tuple, trainer.train_dataset["input_ids"])}) >= 12, "the student's own responses were scored"


RECIPE = """
name: served
output_dir: OUT/run
tokenizer: {path: OUT/base}
sources:
  general: {domain: general, path: OUT/general.jsonl}
stages:
  kd:
    type: kd
    student: OUT/student
    teacher: {base_url: "URL", model: big, k: 12, max_retries: 1, timeout: 5}
    data: [general]
    trainer: {max_steps: 3, per_device_train_batch_size: 4, report_to: none, save_strategy: "no", gradient_checkpointing: false}
"""


def test_a_recipe_with_a_live_and_a_cached_server(server: ScoreServer, tmp_path: Path) -> None:
    text = RECIPE.replace("OUT", str(build_world(tmp_path))).replace("URL", server.url)
    run_recipe(load_recipe_text(text, "served.yaml"))
    cached = text.replace("k: 12,", "cache: {keep: top_k, k: 12},").replace("/run", "/cached")
    recipe = load_recipe_text(cached, "served.yaml")
    cache_teachers(recipe)
    asked = len(server.calls)
    server.__exit__()
    run_recipe(recipe)  # the server is gone, and every row is in the cache
    assert len(server.calls) == asked
    kept = CachedTeacher(next((tmp_path / "cached" / "caches").iterdir())).facts
    assert kept["teacher"] == {"kind": "server", "model": "big", "k": 12} and kept["forced_ids"] == []
    moved = load_recipe_text(cached.replace(server.url, "http://127.0.0.1:9/v1"), "served.yaml")
    assert stage_key(moved, "kd") == stage_key(recipe, "kd")


def change(server: ScoreServer, what: str) -> None:
    if what == "tokenizer":
        server.tokenizer = tiny.swapped_tokenizer()
    elif what == "max_logprobs":
        server.max_logprobs = 5
    elif what == "max_model_len":
        server.max_model_len = 3
    else:
        server.name = "another"


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("tokenizer", "its tokenizer is not the student's"),
        ("max_logprobs", "greater than max allowed: 5.*--max-logprobs"),
        ("max_model_len", "maximum context length"),
        ("name", "no such model or URL"),
    ],
)
def test_preparation_asks_the_server_before_the_first_step(what: str, said: str, server: ScoreServer, tmp_path: Path) -> None:
    text = RECIPE.replace("OUT", str(build_world(tmp_path))).replace("URL", server.url)
    change(server, what)
    with pytest.raises(UserError, match=rf"(?s)stages\.kd\.teacher: .*{said}"):
        prepare(load_recipe_text(text, "served.yaml"))


def test_a_recipe_trains_on_responses_that_the_server_scores(server: ScoreServer, tmp_path: Path) -> None:
    text = RECIPE.replace("OUT", str(build_world(tmp_path))).replace("URL", server.url)
    overrides = ["stages.kd.loss.on_policy=1.0", "stages.kd.loss.max_new_tokens=40"]
    run_recipe(load_recipe_text(text, "served.yaml", overrides))
    longest = max(len(call["prompt"]) for call in server.calls if not isinstance(call["prompt"], str))
    server.max_model_len = longest  # one token less than it needs, for it writes one, too
    again = load_recipe_text(text, "served.yaml", [*overrides, f"output_dir={tmp_path}/again"])
    with pytest.raises(UserError, match=r"(?s)stages\.kd\.teacher: .*maximum context length"):
        prepare(again)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.kd.teacher.cache=hidden", "a server sends the log-probabilities of its most likely tokens only"),
        ("stages.kd.loss.temperature=2.0", "a tail cannot be tempered"),
        ("stages.kd.loss.attention_weight=1.0", "a server .* has distributions alone"),
        (
            "stages.kd.loss.on_policy=1.0 stages.kd.teacher.cache=top_k",
            r"a cache \(teacher\) has what its teacher said of rows",
        ),
        ("stages.kd.teacher.base_url=localhost:8000", "must begin with http"),
        ("stages.kd.teacher.tieout=3", "did you mean 'timeout'"),
        ("stages.kd.teacher.cache=top_k", "with a cache it is `cache.k`"),
    ],
)
def test_what_a_recipe_may_not_say(override: str, said: str, tmp_path: Path) -> None:
    text = RECIPE.replace("OUT", str(tmp_path)).replace("URL", "http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match=said):
        load_recipe_text(text, "served.yaml", override.split())
