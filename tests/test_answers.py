"""Answers: drawn and greedy, batched as one by one, resumed, in FastChat's format."""

from __future__ import annotations

import ast
import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from daekit.errors import UserError
from daekit.evaluation.answers import AnswerStore, HowToAnswer, answer_all, require_answerable
from daekit.evaluation.models import SuiteModel
from daekit.evaluation.questions import TEMPERATURES, Conversation, alpaca_conversations, mt_bench_conversations
from daekit.generation.local import Sampling, generate
from daekit.recipe.suite import SuiteModelSpec
from tests.helpers import tiny
from tests.helpers.shared_data import DATA

FASTCHAT = importlib.util.find_spec("fastchat")
MT_BENCH = DATA / "mt_bench"


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> SuiteModel:
    folder = tmp_path_factory.mktemp("model")
    tiny.model(seed=3).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return SuiteModel("mine", SuiteModelSpec(path=str(folder)))


def conversations(count: int, temperature: float = 0.0) -> list[Conversation]:
    firsts = [" ".join(["w5", f"w{at}"] * (1 + at % 5)) for at in range(count)]
    return [Conversation(81 + at, "writing", (first, f"w{at} w7"), temperature) for at, first in enumerate(firsts)]


def answered(subject, folder, asked, batch_size=4, how=None) -> dict[int, list[str]]:
    how = how or HowToAnswer(max_new_tokens=6)
    store = AnswerStore(folder, subject.name, {"how": how.facts()})
    answer_all(subject, asked, how, store, batch_size=batch_size, where="benchmarks.mt")
    return {key: record["choices"][0]["turns"] for key, record in store.records.items()}


# ---- drawing ---------------------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_distribution():
    model, tokenizer, prompt, temperature = tiny.model(seed=4).eval(), tiny.tokenizer(), [5, 6, 7], 0.7
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1, : len(tiny.WORDS)].double()
    expected = (logits / temperature).softmax(-1).numpy()
    count = 4000
    draws = [Sampling(1, temperature, (at,)) for at in range(count)]
    answers = generate(model, tokenizer, [prompt] * count, max_new_tokens=1, batch_size=1000, sampling=draws)
    drawn = np.bincount([answer[0] if answer else 1 for answer in answers], minlength=len(expected))  # nothing: </s>
    assert len(drawn) == len(expected)  # columns beyond the tokenizer are never drawn
    chi2 = ((drawn - count * expected) ** 2 / (count * expected)).sum()
    assert chi2 < len(expected) - 1 + 4 * np.sqrt(2 * (len(expected) - 1))
    greedy = np.bincount([logits.argmax()], minlength=len(expected)) * count
    assert ((greedy - count * expected) ** 2 / (count * expected)).sum() > 1000


def test_a_batch_changes_neither_drawn_nor_greedy_rows():
    model, tokenizer = tiny.model(seed=5).eval(), tiny.tokenizer()
    prompts = [[3 + (at * 7 + j) % 40 for j in range(1 + at % 6)] for at in range(12)]
    draws = [Sampling(3 + at % 6, [0.0, 0.7, 1.5][at % 3], (0, at)) for at in range(12)]
    state = torch.random.get_rng_state()
    together = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=12, sampling=draws)
    assert torch.equal(state, torch.random.get_rng_state())
    alone = [
        generate(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1, sampling=[draw])[0]
        for prompt, draw in zip(prompts, draws, strict=True)
    ]
    assert together == alone
    assert all(len(answer) <= draw.max_new_tokens for answer, draw in zip(together, draws, strict=True))
    assert any(len(answer) == draw.max_new_tokens < 8 for answer, draw in zip(together, draws, strict=True))
    plain = generate(model, tokenizer, prompts, max_new_tokens=8)
    assert [answer[: draw.max_new_tokens] for answer, draw in zip(plain, draws, strict=True)][::3] == together[::3]
    other = generate(
        model, tokenizer, prompts, max_new_tokens=8, sampling=[replace(draw, seed=(1, *draw.seed)) for draw in draws]
    )
    assert other[::3] == together[::3] and other != together


def test_the_stop_token_ends_an_answer_and_stays_only_where_it_is_wanted():
    model, tokenizer = tiny.model(seed=5).eval(), tiny.tokenizer()
    prompts, draws = [[3 + at] for at in range(12)], [Sampling(30, 1.0, (at,)) for at in range(12)]
    plain, kept = (
        generate(model, tokenizer, prompts, max_new_tokens=30, sampling=draws, keep_stop=keep) for keep in (False, True)
    )
    end = tokenizer.eos_token_id
    assert 0 < sum(answer[-1] == end for answer in kept) < len(kept)  # some end, some are cut
    assert plain == [answer[:-1] if answer[-1] == end else answer for answer in kept]
    assert not any(end in answer for answer in plain)


# ---- conversations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_batched_answers_are_those_of_one_by_one(tmp_path, subject, temperature):
    asked = conversations(9, temperature)
    together = answered(subject, tmp_path / "a", asked, batch_size=9)
    assert together == answered(subject, tmp_path / "b", asked, batch_size=1)
    assert sorted(together) == [each.id for each in asked]
    assert len({tuple(turns) for turns in together.values()}) > 4


def test_the_second_turn_sees_the_first_answer(tmp_path, subject):
    asked = conversations(3)
    found = answered(subject, tmp_path, asked)
    for each in asked:
        first = found[each.id][0]
        messages = [
            {"role": "user", "content": each.turns[0]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": each.turns[1]},
        ]
        prompt = subject.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected = generate(subject.model(), subject.tokenizer, [prompt], max_new_tokens=6)[0]
        assert found[each.id][1] == subject.tokenizer.decode(expected, skip_special_tokens=True).strip()


def test_what_is_answered_is_kept_and_a_torn_line_is_answered_again(tmp_path, subject, monkeypatch):
    asked = conversations(6)
    whole = answered(subject, tmp_path / "whole", asked)
    path = tmp_path / "part" / "mine.jsonl"
    answered(subject, tmp_path / "part", asked[:4])
    before = path.read_bytes()
    path.write_bytes(before[:-20])  # killed while it wrote
    import daekit.evaluation.answers as produce

    sizes = []
    original = produce.generate
    monkeypatch.setattr(produce, "generate", lambda *a, **k: sizes.append(len(a[2])) or original(*a, **k))
    assert answered(subject, tmp_path / "part", asked) == whole
    assert sum(sizes) == 2 * 3  # two turns of the torn one and of the two new ones
    lines = path.read_bytes().splitlines()
    assert lines[:3] == before.splitlines()[:3] and len(lines) == 6
    sizes.clear()
    assert answered(subject, tmp_path / "part", asked) == whole
    assert sizes == []


def test_each_batch_is_on_the_disk_before_the_next(tmp_path, subject, monkeypatch):
    import daekit.evaluation.answers as produce

    calls = []
    original = produce.generate

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(produce, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        answered(subject, tmp_path, conversations(6), batch_size=2)
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == 2


def test_the_file_is_fastchats(tmp_path, subject):
    answered(subject, tmp_path, conversations(2))
    record = json.loads((tmp_path / "mine.jsonl").read_text().splitlines()[0])
    assert set(record) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert record["model_id"] == "mine" and record["choices"][0]["index"] == 0 and len(record["choices"][0]["turns"]) == 2


def test_answers_of_another_run_are_refused(tmp_path, subject):
    answered(subject, tmp_path, conversations(2))
    with pytest.raises(UserError, match="its how differ"):
        answered(subject, tmp_path, conversations(2), how=HowToAnswer(max_new_tokens=7))


def test_cut_answers_are_counted(tmp_path, subject):
    asked = [replace(each, turns=each.turns[:1]) for each in conversations(8)]
    how = HowToAnswer(max_new_tokens=5)
    answered(subject, tmp_path, asked, how=how)
    template = subject.tokenizer.apply_chat_template
    prompts = [template(how.messages(each, []), add_generation_prompt=True, return_dict=True)["input_ids"] for each in asked]
    lengths = [len(ids) for ids in generate(subject.model(), subject.tokenizer, prompts, max_new_tokens=6)]
    store = AnswerStore(tmp_path, "mine", {"how": how.facts()})
    assert store.cut() == sum(length > 4 for length in lengths)
    assert 0 < store.cut() < len(asked)
    store.add({999: [("a", True), ("b", False)]})
    assert AnswerStore(tmp_path, "mine", {"how": how.facts()}).cut() == store.cut() == 1 + sum(length > 4 for length in lengths)


def test_no_room_for_an_answer_is_said(tmp_path, subject):
    long = Conversation(81, "writing", ("w1 " * 250, "w2"), 0.0)
    require_answerable(subject, [replace(long, turns=long.turns[:1])], HowToAnswer(4), "benchmarks.mt")
    with pytest.raises(UserError, match="turn 1 of question 81 has 302 tokens"):
        require_answerable(subject, [replace(long, turns=("w1 " * 300,))], HowToAnswer(4), "benchmarks.mt")
    # less room than max_new_tokens: cut where the context ends, and counted
    answered(subject, tmp_path, [replace(long, turns=("w1 " * 252,))], how=HowToAnswer(50))
    record = json.loads((tmp_path / "mine.jsonl").read_text())
    assert len(record["choices"][0]["turns"][0].split()) <= 2


def test_no_chat_template_is_said(tmp_path):
    tiny.model().save_pretrained(tmp_path)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"models\.bare has no chat template"):
        require_answerable(
            SuiteModel("bare", SuiteModelSpec(path=str(tmp_path))), conversations(1), HowToAnswer(4), "benchmarks.mt"
        )


def test_a_system_message_and_variables_reach_the_template(tmp_path, subject):
    how = HowToAnswer(4, system="w9")
    assert how.messages(conversations(1)[0], ["w3"])[0] == {"role": "system", "content": "w9"}
    assert [m["role"] for m in how.messages(conversations(1)[0], ["w3"])] == ["system", "user", "assistant", "user"]
    template = subject.tokenizer.chat_template
    variables = HowToAnswer(4, chat_template_kwargs={"mood": "joy"})
    try:
        for broken, said in (("{{ raise_exception('no ' + mood) }}", "no joy"), ("{{ 1 / 0 }}", "division by zero")):
            subject.tokenizer.chat_template = broken
            with pytest.raises(UserError, match=rf"b: models\.mine: .*chat_template refuses the conversation \(.*{said}"):
                require_answerable(subject, conversations(1), variables, "b")
    finally:
        subject.tokenizer.chat_template = template


# ---- questions -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(FASTCHAT is None, reason="fschat is not installed")
def test_temperatures_are_fastchats():
    source = (Path(FASTCHAT.submodule_search_locations[0]) / "llm_judge" / "common.py").read_text()
    assigned = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    (table,) = [node.value for node in assigned if node.targets[0].id == "temperature_config"]
    assert ast.literal_eval(table) == TEMPERATURES


@pytest.mark.skipif(not MT_BENCH.is_dir(), reason="no MT-Bench data here")
def test_the_real_questions():
    found, _ = mt_bench_conversations(MT_BENCH / "question.jsonl", "b", None, None)
    assert len(found) == 80 and all(len(each.turns) == 2 for each in found)
    assert {each.category: each.temperature for each in found}["roleplay"] == 0.7
    assert {each.temperature for each in mt_bench_conversations(MT_BENCH / "question.jsonl", "b", 3, 0.2)[0]} == {0.2}


def test_questions_that_are_none(tmp_path):
    path = tmp_path / "question.jsonl"
    path.write_text('{"question_id": 1, "category": "x", "turns": []}\n')
    with pytest.raises(UserError, match="line 1: needs question_id"):
        mt_bench_conversations(path, "b", None, None)
    path.write_text('{"question_id": 1, "category": "x", "turns": ["a"]}\n' * 2)
    with pytest.raises(UserError, match="twice"):
        mt_bench_conversations(path, "b", None, None)
    outputs = tmp_path / "outputs.json"
    outputs.write_text('[{"instruction": "a", "output": "b"}, {"output": "c"}]')
    with pytest.raises(UserError, match="row 1 has no text"):
        alpaca_conversations(outputs, "b", None, 0.0)
