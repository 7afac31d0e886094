"""Likelihood benchmarks against their plain twins: whole logits in float64, one text at a time."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from daekit.errors import UserError
from daekit.evaluation.likelihood import likelihood_benchmark
from daekit.evaluation.likelihood.perplexity import blocks_of, windows
from daekit.evaluation.matching import rouge_l
from daekit.models.scoring import score_rows, score_tokens
from daekit.protocol import IGNORE_INDEX
from daekit.recipe.schema import ModelSpec
from daekit.recipe.suite import MinimalPairsSpec, MultipleChoiceSpec, PerplexitySpec, RowsSpec
from tests.helpers import tiny

EOS = 1  # the tiny tokenizer has no BOS


@pytest.fixture(scope="module")
def model():
    return tiny.model().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def plain_log_probabilities(model, ids: list[int]) -> list[float]:
    """Of every token but the first, from the logits of the tokenizer's own columns."""
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        log_p = exact(input_ids=torch.tensor([ids])).logits[0, :, : len(tiny.WORDS)].log_softmax(-1)
    return [log_p[at, token].item() for at, token in enumerate(ids[1:])]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pairs(count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    made = []
    while len(made) < count:
        good, bad = tiny.words(rng, 1, 9), tiny.words(rng, 1, 9)
        if good != bad:
            made.append({"sentence_good": good, "sentence_bad": bad})
    return made


# ---- minimal pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["auto", "none"])
def test_minimal_pairs_item_by_item(tmp_path, model, tokenizer, prefix):
    data = {"a": pairs(12, 1), "b": pairs(5, 2)}
    for name, rows in data.items():
        write_lines(tmp_path / f"{name}.jsonl", rows)
    found = likelihood_benchmark("blimp", MinimalPairsSpec(path=str(tmp_path), prefix=prefix)).measure(model, tokenizer, 4)
    before = [EOS] if prefix == "auto" else []
    right = {"a": [], "b": []}
    items = iter(found.items)
    for name, rows in data.items():
        for at, row in enumerate(rows):
            good, bad = (
                sum(plain_log_probabilities(model, before + tokenizer(row[f"sentence_{kind}"])["input_ids"]))
                for kind in ("good", "bad")
            )
            item = next(items)
            assert (item["paradigm"], item["row"]) == (name, at)
            assert item["good"] == pytest.approx(good, abs=1e-4) and item["bad"] == pytest.approx(bad, abs=1e-4)
            assert item["correct"] == (good > bad)
            right[name].append(good > bad)
    shares = [np.mean(hits) for hits in right.values()]
    assert 0 < np.mean(shares) < 1 and shares[0] != shares[1]
    for name, share in zip(right, shares, strict=True):
        assert found.values["blimp", name, "accuracy"].mean == pytest.approx(share)
    total = sum(value.total_R.sum() for value in found.values.values())
    weight = sum(value.weight_R.sum() for value in found.values.values())
    assert total / weight == pytest.approx(np.mean(shares))  # the macro average, though one paradigm has more pairs


def test_sentences_of_equal_tokens_are_a_tie_and_ties_are_wrong(tmp_path, model, tokenizer):
    # both words are unknown to the tokenizer; the other pairs put the two into different batches
    rows = [{"sentence_good": "w1 xylophone w2", "sentence_bad": "w1 zebra w2"}, *pairs(9, 3)]
    rows.append({"sentence_good": "w1 w2", "sentence_bad": "w1 w2"})  # as in BLiMP's passive_1
    benchmark = likelihood_benchmark("p", MinimalPairsSpec(path=str(write_lines(tmp_path / "p.jsonl", rows))))
    found = benchmark.measure(model, tokenizer, 1)
    assert found.items[0]["good"] == found.items[0]["bad"] and not found.items[0]["correct"]
    assert not found.items[-1]["correct"]
    right_R = found.values["p", "p", "accuracy"].total_R
    assert right_R[0] == right_R[-1] == 0
    assert "2 ties, which count as wrong" in found.notes[0]


def test_a_limit_is_per_paradigm(tmp_path, model, tokenizer):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", pairs(6, 4))
    found = likelihood_benchmark("p", MinimalPairsSpec(path=str(tmp_path), limit=2)).measure(model, tokenizer, 8)
    assert [len(value.total_R) for value in found.values.values()] == [2, 2]


# ---- perplexity ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 12, 13, 40])
@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 1), (8, 7), (2, 1)])
def test_windows_score_every_token_once_with_its_context(length, window, stride):
    ids = list(range(100, 100 + length))
    scored = []
    for row in windows(ids, window, stride):
        assert len(row["input_ids"]) <= window
        for at, (token, label) in enumerate(zip(row["input_ids"], row["labels"], strict=True)):
            if label != IGNORE_INDEX and at > 0:
                assert label == token
                context = row["input_ids"][:at]
                assert context == ids[token - 100 - at : token - 100]
                assert at == token - 100 or at >= window - stride
                scored.append(token)
    assert scored == ids[1:]


def test_bits_per_byte_by_windows(tmp_path, model, tokenizer):
    rng = random.Random(5)
    documents = [tiny.words(rng, 40, 60), "w3 w4", tiny.words(rng, 20, 30)]
    for at, text in enumerate(documents):
        (tmp_path / f"{at}.txt").write_text(text)
    spec = PerplexitySpec(texts={"novels": str(tmp_path)}, window=16, stride=6, block=20)
    found = likelihood_benchmark("text", spec).measure(model, tokenizer, 4)
    total, tokens = 0.0, 0
    for text in documents:
        ids = [EOS, *tokenizer(text)["input_ids"]]
        tokens += len(ids) - 1
        for at in range(1, len(ids)):
            # the window in which this token is scored
            start = 0 if at < 16 else 6 * math.ceil((at - 15) / 6)
            total -= plain_log_probabilities(model, ids[start : at + 1])[-1]
    size = sum(len(text.encode()) for text in documents)
    assert found.values["novels", "text", "nll"].mean == pytest.approx(total / tokens, rel=1e-5)
    assert found.values["novels", "text", "bits_per_byte"].mean == pytest.approx(total / math.log(2) / size, rel=1e-5)
    assert len(found.values["novels", "text", "nll"].total_R) > len(documents)


def test_blocks_hold_the_bytes_of_their_characters():
    text = "aé漢🙂" * 10 + "z"
    starts = np.arange(len(text))
    blocks = blocks_of(text, 7, np.ones(len(text)), starts, skipped=0)
    assert blocks.bytes_R.sum() == len(text.encode())
    assert blocks.tokens_R.tolist() == [7, 7, 7, 7, 7, 6]
    assert blocks.bytes_R[0] == len(text[:7].encode())
    assert blocks_of(text, 7, np.ones(len(text)), starts, skipped=1).bytes_R[0] == blocks.bytes_R[0] - 1


def test_without_a_prefix_the_first_token_and_its_bytes_do_not_count(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text("w11 w2 w3")
    spec = PerplexitySpec(texts={"d": str(tmp_path / "a.txt")}, window=8, stride=4, prefix="none")
    found = likelihood_benchmark("text", spec).measure(model, tokenizer, 4)
    log_p = plain_log_probabilities(model, tokenizer("w11 w2 w3")["input_ids"])
    assert found.values["d", "text", "nll"].mean == pytest.approx(-sum(log_p) / 2, rel=1e-5)
    assert found.values["d", "text", "bits_per_byte"].mean == pytest.approx(-sum(log_p) / math.log(2) / len(" w2 w3"), rel=1e-5)


def test_unknown_tokens_are_told(tmp_path, model, tokenizer):
    (tmp_path / "a.txt").write_text("w1 zebra w3 zoo")
    spec = PerplexitySpec(texts={"d": str(tmp_path / "a.txt")}, window=8, stride=4)
    found = likelihood_benchmark("t", spec).measure(model, tokenizer, 4)
    assert any("2 tokens are <unk>" in note for note in found.notes)


def test_tokens_sum_to_rows(model):
    rng = random.Random(6)
    rows = []
    for _ in range(9):
        ids = [rng.randrange(3, 40) for _ in range(rng.randint(2, 12))]
        rows.append({"input_ids": ids, "labels": [token if rng.random() < 0.7 else IGNORE_INDEX for token in ids]})
    rows.append({"input_ids": [5], "labels": [5]})  # nothing predicts it
    sums = score_rows(model, rows, vocab_size=43, batch_size=3)
    tokens = score_tokens(model, rows, vocab_size=43, batch_size=4, chunk_size=5)
    assert [len(each) for each in tokens] == sums.tokens_R.tolist()
    assert np.allclose([each.sum() for each in tokens], sums.nll_R, atol=1e-5)
    row = rows[0]
    exact = plain_log_probabilities(model, row["input_ids"])
    kept = [-p for p, label in zip(exact, row["labels"][1:], strict=True) if label != IGNORE_INDEX]
    assert np.allclose(tokens[0], kept, atol=1e-5)


# ---- multiple choice -------------------------------------------------------------------------------------------------


def test_multiple_choice_item_by_item(tmp_path, model, tokenizer):
    rng = random.Random(7)
    rows = []
    for at in range(20):
        choices = list(dict.fromkeys(tiny.words(rng, 1, 5) for _ in range(4)))
        answer = rng.randrange(len(choices))
        said = [answer, "ABCD"[answer], choices[answer]][at % 3]
        rows.append({"q": tiny.words(rng, 2, 6), "choices": choices, "answer": said})
    spec = MultipleChoiceSpec(path=str(write_lines(tmp_path / "m.jsonl", rows)), prompt="w0 {q} w1")
    found = likelihood_benchmark("quiz", spec).measure(model, tokenizer, 4)
    right: dict[str, list[bool]] = {"accuracy": [], "accuracy_per_token": [], "accuracy_per_byte": []}
    for row, item in zip(rows, found.items, strict=True):
        context = [EOS, *tokenizer(f"w0 {row['q']} w1")["input_ids"]]
        sums, means, by_byte = [], [], []
        for choice in row["choices"]:
            ids = tokenizer(choice)["input_ids"]
            sums.append(sum(plain_log_probabilities(model, context + ids)[len(context) - 1 :]))
            means.append(sums[-1] / len(ids))
            by_byte.append(sums[-1] / len(choice))
        assert item["log_p"] == pytest.approx(sums, abs=1e-4)
        for metric, values in zip(right, (sums, means, by_byte), strict=True):
            right[metric].append(int(np.argmax(values)) == item["answer"])
    for metric, hits in right.items():
        assert found.values["quiz", "quiz", metric].mean == pytest.approx(np.mean(hits))
    assert len({tuple(hits) for hits in right.values()}) > 1


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"q": "w1", "choices": ["w1"], "answer": 0}, "at least two texts"),
        ({"q": "w1", "choice": ["w1", "w2"], "answer": 0}, "did you mean 'choice'?"),
        ({"q": "w1", "choices": ["w1", "w2"], "answer": 2}, "'answer' is 2"),
        ({"q": "w1", "choices": ["w1", "w2"], "answer": "C"}, "'answer' is 'C'"),
        ({"q": "w1", "choices": ["w1", "w2"], "answer": True}, "'answer' is True"),
        ({"question": "w1", "choices": ["w1", "w2"], "answer": 0}, "does not fit the row"),
    ],
)
def test_a_question_that_cannot_be_asked(tmp_path, row, says):
    with pytest.raises(UserError, match="line 1") as caught:
        likelihood_benchmark("quiz", MultipleChoiceSpec(path=str(write_lines(tmp_path / "m.jsonl", [row])), prompt="{q}"))
    assert says in str(caught.value)


def test_a_letter_that_is_a_choice_is_that_choice(tmp_path):
    row = {"q": "w1", "choices": ["B", "A"], "answer": "A"}
    benchmark = likelihood_benchmark(
        "quiz", MultipleChoiceSpec(path=str(write_lines(tmp_path / "m.jsonl", [row])), prompt="{q}")
    )
    assert benchmark.questions[0].answer == 1


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_rows_measure_the_distance_to_a_reference(tmp_path, model, tokenizer):
    for name, each in {"same": model, "other": tiny.model(seed=9)}.items():
        each.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows(6, seed=8)]
    rows[0]["teacher_prompt"] = f"w9 w8 {rows[0]['prompt']}"  # what a teacher is told beside is no matter of the distance
    path = str(write_lines(tmp_path / "rows.jsonl", rows))

    def measure(reference):
        spec = RowsSpec(path=path, domain="shop", max_new_tokens=3, reference=ModelSpec(path=str(tmp_path / reference)))
        benchmark = likelihood_benchmark("rows", spec)
        benchmark.check("m", tokenizer, 256)
        return benchmark.measure(model, tokenizer, 4)

    assert measure("same").values["shop", "rows", "kl_to_reference"].mean == pytest.approx(0, abs=1e-6)
    found = measure("other")
    assert found.values["shop", "rows", "kl_to_reference"].mean > 0.1
    metrics = {metric for _, _, metric in found.values}
    assert metrics == {"nll", "token_accuracy", "kl_to_reference", "exact_match", "rouge_l"}
    assert len(found.generated["rows"]) == 6


def test_rows_that_do_not_fit_are_told_before_the_weights(tmp_path, tokenizer):
    path = str(write_lines(tmp_path / "rows.jsonl", [{"prompt": "w1 " * 20, "completion": "w2"}]))
    benchmark = likelihood_benchmark("rows", RowsSpec(path=path, max_new_tokens=20))
    benchmark.check("m", tokenizer, 40)
    with pytest.raises(UserError, match="40 tokens are more than the 39"):
        benchmark.check("m", tokenizer, 39)


# ---- what is wrong is said -------------------------------------------------------------------------------------------


def test_what_is_wrong_with_a_file_is_said(tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    cases = [
        (MinimalPairsSpec(path=str(tmp_path / "empty")), "holds no .jsonl file"),
        (
            MinimalPairsSpec(path=str(write_lines(tmp_path / "a.jsonl", [{"sentence_good": "a"}]))),
            "needs a text in 'sentence_bad'",
        ),
        (MinimalPairsSpec(path=str(write_lines(tmp_path / "b.jsonl", []))), "has no pairs"),
        (PerplexitySpec(texts={"d": str(tmp_path / "empty")}), "has no text"),
        (PerplexitySpec(texts={"d": str(write_lines(tmp_path / "d.jsonl", [{"txt": "a"}]))}), "needs a text in 'text'"),
    ]
    for spec, says in cases:
        with pytest.raises(UserError) as caught:
            likelihood_benchmark("x", spec)
        assert says in str(caught.value) and "benchmarks.x" in str(caught.value)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        likelihood_benchmark("x", PerplexitySpec(texts={"d": str(tmp_path / "latin.txt")}))


def test_what_does_not_fit_the_model_is_said(tmp_path, tokenizer):
    pairs_file = write_lines(tmp_path / "p.jsonl", [{"sentence_good": "w1 " * 30, "sentence_bad": "w2"}])
    (tmp_path / "t.txt").write_text("w1 w2")
    with pytest.raises(UserError, match="31 tokens are more than the 30"):
        likelihood_benchmark("x", MinimalPairsSpec(path=str(pairs_file))).check("m", tokenizer, 30)
    likelihood_benchmark("x", MinimalPairsSpec(path=str(pairs_file))).check("m", tokenizer, 31)
    with pytest.raises(UserError, match="1024 tokens are more than the 512"):
        likelihood_benchmark("x", PerplexitySpec(texts={"d": str(tmp_path / "t.txt")})).check("m", tokenizer, 512)
    with pytest.raises(UserError, match="prefix=bos, but the tokenizer has no such token"):
        likelihood_benchmark("x", MinimalPairsSpec(path=str(pairs_file), prefix="bos")).check("m", tokenizer, 64)


# ---- ROUGE-L ---------------------------------------------------------------------------------------------------------


def plain_common_subsequence(a: list[str], b: list[str]) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence():
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abcd") for _ in range(rng.randint(0, 14))] for _ in range(2))
        common = plain_common_subsequence(a, b)
        expected = 2 * common / (len(a) + len(b)) if common else 0.0
        assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)
    assert rouge_l("The cat-sat, on: the MAT!", "the cat sat on the mat") == 1.0
    assert rouge_l("...", "...") == 0.0
