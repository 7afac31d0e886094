"""Evaluation: rows tokenised as TRL does, matching, intervals, comparison, and the whole of it on tiny models."""

import copy
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from daekit.data import responses
from daekit.data.responses import ResponseLabels, label_responses
from daekit.data.tokenize import TokenizedRow, tokenize_each
from daekit.errors import UserError
from daekit.evaluation import ModelEvaluation, compare, evaluate_model, select_samples, tokenize_rows
from daekit.evaluation.intervals import RowValues, interval, paired_interval
from daekit.evaluation.matching import answer_match, exact_match
from daekit.evaluation.sets import EvaluationSet
from daekit.generation.local import generate
from daekit.models.scoring import score_rows
from daekit.recipe.schema import EvaluationSpec
from daekit.teachers import ModelTeacher
from tests.helpers import tiny

USER, ANSWER = {"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7 w8 w9"}
FORMS = {
    "prompt and completion": {"prompt": "w1 w2 w3 ", "completion": "w4 w5"},
    "completion with eos": {"prompt": "w1 ", "completion": "w4 </s>"},
    "text": {"text": "w1 w2 w3 </s>"},
    "conversational completion": {"prompt": [USER], "completion": [ANSWER]},
    "messages": {"messages": [USER, ANSWER, USER, ANSWER]},
}
TOKENS = {word: index for index, word in enumerate(tiny.WORDS)}


def ids(text):
    return [TOKENS[word] for word in text.split()]


def tokenize(rows, tokenizer=None, **options):
    return tokenize_rows(rows, tokenizer or tiny.tokenizer(), **({"source": "shop", "domain": "shop"} | options))


CONVERSATIONS = ("conversational completion", "messages")


@pytest.mark.parametrize(
    ("form", "assistant_only_loss"), [*((form, False) for form in FORMS), *((form, True) for form in CONVERSATIONS)]
)
def test_ids_and_labels_are_those_of_trl(form, assistant_only_loss):
    from trl import SFTConfig, SFTTrainer

    row, tokenizer = FORMS[form], tiny.tokenizer()
    trainer = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss="prompt" in row, chat_template=None)
    args = SFTConfig(
        "unused", max_length=None, assistant_only_loss=assistant_only_loss, bf16=False, use_cpu=True, shuffle_dataset=False
    )
    dataset = Dataset.from_list([row])
    expected = SFTTrainer._prepare_dataset(trainer, dataset, tokenizer, args, False, None, "eval")[0]
    (ours,) = tokenize(dataset, tokenizer, assistant_only_loss=assistant_only_loss).rows
    assert ours.input_ids == expected["input_ids"]
    assert ours.labels == expected["labels"]


def test_prompts_and_references():
    completion, _, text, conversation, messages = tokenize([copy.deepcopy(row) for row in FORMS.values()]).rows
    assert (completion.prompt_ids, completion.prompt, completion.reference) == (ids("w1 w2 w3"), "w1 w2 w3 ", "w4 w5")
    assert text.prompt_ids is None
    assert (conversation.prompt_ids, conversation.prompt) == (ids("w0 w5 w6 w1"), "w5 w6")
    assert conversation.reference == messages.reference == "w7 w8 w9"
    assert messages.prompt == "user: w5 w6\nassistant: w7 w8 w9\nuser: w5 w6"
    assert messages.prompt_ids == ids("w0 w5 w6 w1 w7 w8 w9 </s> w0 w5 w6 w1")
    assert [label for label in messages.labels if label != -100] == ids("w7 w8 w9 </s>") * 2


def test_messages_are_scored_on_the_tokens_that_training_takes_by_default():
    messages, tokenizer = FORMS["messages"]["messages"], tiny.tokenizer()
    for template in (tiny.CHAT_TEMPLATE, re.sub("{% (end)?generation %}", "", tiny.CHAT_TEMPLATE)):
        tokenizer.chat_template = template
        (row,) = tokenize([{"messages": messages}], tokenizer).rows
        expected = label_responses(
            Dataset.from_list([{"messages": messages}]), tokenizer, ResponseLabels.of(tokenizer), "train"
        )
        assert row.labels == expected[0]["labels"] and row.input_ids == expected[0]["input_ids"]


UNMARKED = re.sub("{% (end)?generation %}", "", tiny.CHAT_TEMPLATE)
MANY = {
    "messages": [{"messages": [USER, ANSWER] * (1 + at % 3)} for at in range(7)],
    "unanswered": [{"messages": [USER, ANSWER, USER][: 2 + at % 2]} for at in range(7)],
    "options": [{"messages": [USER, ANSWER], "chat_template_kwargs": {"word": f"w{at % 2}"}} for at in range(7)],
    "pairs": [{"prompt": [USER] * (at + 1), "completion": [ANSWER]} for at in range(7)],
    "plain": [{"prompt": "w1 " * (at + 1), "completion": "w2"} for at in range(7)],
    "text": [{"text": "w1 w2 " * (at + 1), "answer": "w2"} for at in range(7)],
    "mixed": [*FORMS.values()],
}


@pytest.mark.parametrize("assistant_only_loss", [None, False, True])
@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, UNMARKED, "{{ word }} " + tiny.CHAT_TEMPLATE])
@pytest.mark.parametrize("rows", MANY.values(), ids=MANY)
def test_many_rows_at_once_are_the_same_as_one_by_one(rows, template, assistant_only_loss, monkeypatch):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    if assistant_only_loss and template == UNMARKED:
        pytest.skip("refused: no markers")
    calls = []
    render = responses.render
    monkeypatch.setattr(responses, "render", lambda *given, **how: calls.append(given) or render(*given, **how))
    single = [each for row in rows for each in tokenize_each([row], tokenizer, "row", assistant_only_loss)]
    one_by_one = len(calls)
    assert [*tokenize_each(rows, tokenizer, "row", assistant_only_loss)] == single
    trained = [*tokenize_each(rows, tokenizer, "row", assistant_only_loss, prompts=False)]
    assert [(row.input_ids, row.labels) for row in trained] == [(row.input_ids, row.labels) for row in single]
    if rows is MANY["messages"]:
        assert len(calls) - one_by_one < one_by_one  # it was one call for all of them


def test_a_bad_row_among_many_is_named():
    refusing = "{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + tiny.CHAT_TEMPLATE
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = refusing
    rows = [{"messages": [USER, ANSWER]}] * 300
    rows[270] = {"messages": [USER, ANSWER, USER, ANSWER]}
    with pytest.raises(UserError, match=r"^row 270: .*too long"):
        list(tokenize_each(rows, tokenizer, "row"))
    rows[270] = {"messages": [USER, USER]}
    with pytest.raises(UserError, match=r"^row 270: has no assistant tokens"):
        list(tokenize_each(rows, tokenizer, "row"))


REFUSALS = {
    "{{ raise_exception('only user and assistant') }}": "row 0: .*only user and assistant.*roles are user[.,]",
    "{{ messages[0]['content'] + tools }}": "row 0: .*refuses",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "does not come to an end",
}


@pytest.mark.parametrize("template", REFUSALS)
def test_what_a_chat_template_refuses_names_source_and_row(template, monkeypatch):
    monkeypatch.setattr(responses, "SECONDS_PER_ROW", 0.1)
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=REFUSALS[template]):
        tokenize([FORMS["conversational completion"]], tokenizer)


def test_a_prompt_that_is_not_a_prefix_is_counted():
    rows = [{"prompt": "w1 w", "completion": "2 w3"}, {"prompt": "w1 ", "completion": "w2"}]
    found = tokenize(rows)
    assert found.rows[0].labels == [-100, *ids("w2 w3 </s>")]
    assert [row.boundary_differs for row in found.rows] == [True, False]
    assert "in 1 of 2 validation rows" in found.notes("shop")[0]


def test_long_rows_are_never_cut_in_silence():
    rows = [{"prompt": "w1 ", "completion": "w2 " * length} for length in (1, 5, 9)]
    with pytest.raises(UserError, match=r"2 of 3 validation rows are longer than max_length = 4 .* longest has 11"):
        tokenize(rows, max_length=4)
    kept = tokenize(rows, max_length=7, overlong="drop")
    assert (len(kept.rows), kept.left_out) == (2, (2,))
    assert "1 of 3 validation rows are longer than max_length = 7" in kept.notes("shop")[0]
    with pytest.raises(UserError, match="no validation rows to evaluate on: all 3"):
        tokenize(rows, max_length=2, overlong="drop")
    assert len(tokenize(rows, limit=2).rows) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w1"}, "validation row 1 has the columns prompt"),
        ({"text": ""}, "validation row 1 has no token to predict"),
        ({"prompt": "w1 ", "completion": "w2", "answer": " "}, "validation row 1: its answer is empty"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(UserError, match=message):
        tokenize([{"text": "w1 w2"}, row])


def test_a_conversation_needs_a_chat_template():
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tokenize([FORMS["messages"]], tokenizer)


@pytest.mark.parametrize(
    ("generated", "answer", "found"),
    [
        ("it is 42", "42", True),
        ("It is 42.", "42", True),
        ("142", "42", False),
        ("421", "42", False),
        ("-42", "42", False),
        ("it is -42", "42", False),
        ("it is -42", "-42", True),
        ("3-42", "42", True),
        ("4.2", "4", False),
        ("4.2", "2", False),
        ("4,200", "4", False),
        ("on page 4, 2 lines", "4", True),
        ("a RED  kettle", "red kettle", True),
        ("a reddish kettle", "red", False),
        ("(a+b)", "a+b", True),
        ("aab", "a+b", False),
        ("naïve café", "café", True),
        ("", "x", False),
    ],
)
def test_answer_match(generated, answer, found):
    assert answer_match(generated, answer) is found


def test_exact_match_ignores_only_space_at_the_ends():
    assert exact_match(" 42\n", "42")
    assert not exact_match("It is 42", "it is 42")
    with pytest.raises(ValueError, match="empty"):
        answer_match("anything", "  ")


def shares(hits):
    return RowValues(np.asarray(hits, dtype=np.float64), np.ones(len(hits)))


def test_interval_of_constant_rows_and_of_one_row_has_no_width():
    assert interval(shares([1.0] * 50), 200, 0) == (1.0, 1.0)
    assert interval(shares([0.0]), 200, 0) == (0.0, 0.0)
    tokens = np.arange(1.0, 40.0)
    assert interval(RowValues(0.3 * tokens, tokens), 200, 0) == pytest.approx((0.3, 0.3), rel=1e-12)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered, trials = np.random.default_rng(7), 0, 300
    for trial in range(trials):
        weight = random.integers(1, 9, size=120).astype(float)
        low, high = interval(RowValues(random.binomial(weight.astype(int), 0.3).astype(float), weight), 300, trial)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / trials <= 0.98


def test_rows_are_resampled_not_tokens():
    """Tokens of a row that agree with each other count as one observation: the interval is that of the rows."""
    hits = np.random.default_rng(1).binomial(1, 0.5, size=60).astype(float)
    long = RowValues(100 * hits, np.full(60, 100.0))
    assert interval(long, 500, 3) == interval(shares(hits), 500, 3)
    low, high = interval(long, 500, 3)
    assert high - low > 0.2


def test_a_resample_is_a_ratio_of_sums_and_no_mean_of_ratios():
    """Twenty long rows of value 1 and twenty short ones of value 0: 0.99 by tokens, 0.5 by rows."""
    values = RowValues(np.repeat([99.0, 0.0], 20), np.repeat([99.0, 1.0], 20))
    low, high = interval(values, 300, 0)
    assert 0.9 < low < values.mean < high < 1


def test_resamples_are_seeded_and_independent_of_the_block(monkeypatch):
    values = shares(np.random.default_rng(2).random(50))
    assert interval(values, 400, 1) == interval(values, 400, 1) != interval(values, 400, 2)
    whole = interval(values, 400, 1)
    monkeypatch.setattr("daekit.evaluation.intervals._BLOCK", 300)
    assert interval(values, 400, 1) == whole


def test_a_diverged_model_has_no_finite_interval(recwarn):
    lost = RowValues(np.array([1.0, np.inf, 2.0]), np.ones(3))
    assert not np.isfinite(interval(lost, 50, 0)[1])
    assert not any(np.isfinite(paired_interval(lost, lost, 50, 0)))
    assert not recwarn.list


def test_pairing_takes_out_what_rows_have_in_common():
    random = np.random.default_rng(5)
    difficulty = random.normal(size=200)
    ours, theirs = shares(difficulty + 0.1), shares(difficulty)
    assert paired_interval(ours, theirs, 300, 0) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="same rows"):
        paired_interval(ours, shares([1.0]), 300, 0)


def evaluation(model, **values):
    keyed = {(domain, source, metric): shares(v) for (domain, source, metric), v in values["values"].items()}
    return ModelEvaluation(model, keyed, values.get("generated", {}))


def test_gain_and_forgetting_have_the_sign_they_should():
    base = {("shop", "s", "exact_match"): [0, 0, 0, 1], ("general", "g", "exact_match"): [1, 1, 1, 1]}
    base |= {("shop", "s", "nll"): [3.0] * 4, ("general", "g", "nll"): [1.0] * 4}
    after = {("shop", "s", "exact_match"): [0, 1, 1, 1], ("general", "g", "exact_match"): [1, 0, 1, 1]}
    after |= {("shop", "s", "nll"): [1.0] * 4, ("general", "g", "nll"): [1.5] * 4}
    models = [evaluation("kd", values=base), evaluation("dae", values=after)]
    rows = compare(models, "kd", reference_domains=["general"], rounds=200)
    found = {(row.domain, row.metric): (row.value, row.low, row.high) for row in rows}
    assert {row.model for row in rows} == {"dae"} and len(rows) == 4
    assert found["shop", "exact_match_gain"][0] == 0.5
    assert found["general", "exact_match_forgetting"][0] == 0.25
    assert found["shop", "nll_gain"] == (2.0, 2.0, 2.0)
    assert found["general", "nll_forgetting"] == (0.5, 0.5, 0.5)
    with pytest.raises(UserError, match=r"'sft'.*kd, dae"):
        compare(models, "sft", reference_domains=["general"], rounds=10)


def test_sources_of_a_domain_are_pooled_and_shown_each():
    values = {("general", "skills", "nll"): [1.0], ("general", "chat", "nll"): [4.0, 4.0], ("shop", "s", "nll"): [2.0]}
    rows = {(row.domain, row.metric): row for row in evaluation("kd", values=values).rows(50)}
    assert rows["general", "nll"].value == 3.0 and rows["general", "nll"].n == 3
    assert rows["general/skills", "nll"].value == 1.0 and rows["general/chat", "nll"].value == 4.0
    assert ("shop/s", "nll") not in rows
    assert rows["general", "perplexity"].value == pytest.approx(np.exp(3.0))


def test_samples_prefer_rows_on_which_the_models_differ():
    rows = tuple(TokenizedRow([3, 4], [-100, 4], [3], f"p{index}", "yes") for index in range(8))
    a = ["yes", "yes", "no", "no", "no", "yes", "yes", "yes"]
    b = ["yes", "yes", "no", "no", "yes", "yes", "no", "yes"]
    models = [ModelEvaluation(name, {}, {"s": texts}) for name, texts in (("a", a), ("b", b))]
    chosen = select_samples(models, {"s": EvaluationSet("shop", rows)}, first=1, mismatches=3)
    assert [sample.row for sample in chosen if sample.model == "a"] == [0, 2, 4, 6]
    assert [sample.exact_match for sample in chosen if sample.model == "b"] == [True, False, True, False]


@pytest.fixture(scope="module")
def measured():
    tokenizer, model, teacher = tiny.tokenizer(), tiny.model(), tiny.model("mixtral", seed=1)
    rows = [row | {"answer": "w3"} for row in tiny.rows(9, seed=3)]
    known = generate(model, tokenizer, [ids(rows[0]["prompt"])], max_new_tokens=6)[0]
    rows[0]["completion"] = tokenizer.decode(known)  # so that one answer matches
    sets = {"catalogue": tokenize(rows, domain="shop"), "books": tokenize([{"text": "w1 w2 w3"}], domain="general")}
    spec = EvaluationSpec(max_new_tokens=6, batch_size=4, bootstrap=100)
    result = evaluate_model("kd", model, tokenizer, sets, spec=spec, teachers={"shop": teacher})
    return SimpleNamespace(model=model, teacher=teacher, sets=sets, result=result, known=tokenizer.decode(known))


def test_every_metric_of_a_whole_evaluation(measured):
    rows = {(row.domain, row.metric): row for row in measured.result.rows(100)}
    shop = {"nll", "perplexity", "token_accuracy", "kl_to_teacher", "exact_match", "rouge_l", "answer_match"}
    assert {metric for domain, metric in rows if domain == "shop"} == shop
    assert {metric for domain, metric in rows if domain == "general"} == {"nll", "perplexity", "token_accuracy"}
    tokenized = measured.sets["catalogue"].rows
    scores = score_rows(
        measured.model,
        [{"input_ids": row.input_ids, "labels": row.labels} for row in tokenized],
        vocab_size=len(tiny.WORDS),
        teacher=measured.teacher,
    )
    assert rows["shop", "nll"].value == pytest.approx(scores.nll_R.sum() / scores.tokens_R.sum())
    assert rows["shop", "kl_to_teacher"].value == pytest.approx(scores.kl_R.sum() / scores.tokens_R.sum())
    assert rows["shop", "perplexity"].value == pytest.approx(np.exp(rows["shop", "nll"].value))
    assert rows["shop", "exact_match"].value == pytest.approx(1 / 9)
    assert all(row.low <= row.value <= row.high for row in rows.values())
    assert {row.n for (domain, _), row in rows.items() if domain == "shop"} == {9}


@pytest.mark.parametrize("taught", [False, True])
def test_kl_to_a_reference_is_the_same_with_a_teacher_beside_it_and_without(taught, measured):
    """A teacher's own prompt changes neither the model's likelihood nor that KL."""
    prompt = (lambda row: row.prompt_ids[:1] + row.prompt_ids) if taught else lambda row: None
    told = {
        name: replace(each, rows=tuple(replace(row, teacher_prompt_ids=prompt(row)) for row in each.rows))
        for name, each in measured.sets.items()
        if name == "catalogue"
    }
    spec = EvaluationSpec(generate=False, batch_size=4)
    reference, teacher = ModelTeacher(tiny.model(seed=2), len(tiny.WORDS)), ModelTeacher(measured.teacher, len(tiny.WORDS))
    found = [
        evaluate_model("kd", measured.model, tiny.tokenizer(), told, spec=spec, teachers=teachers, reference=reference).values
        for teachers in ({}, {"shop": teacher}, {"shop": reference})
    ]
    assert set(found[0]) == set(found[1]) - {("shop", "catalogue", "kl_to_teacher")}
    for key, values in found[0].items():
        assert all(np.array_equal(values.total_R, other[key].total_R) for other in found[1:]), key
    assert found[0]["shop", "catalogue", "kl_to_reference"].mean > 0


def test_samples_of_a_whole_evaluation(measured):
    samples = select_samples([measured.result], measured.sets)
    assert samples[0].exact_match and samples[0].generated == measured.known
    assert {sample.domain for sample in samples} == {"shop"}
