"""The way of a batch: collation, the one shift, selection of rows, overlong rows, token means."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import Any

import datasets
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from daekit.data.collator import DomainCollator, as_batch
from daekit.data.preparation import fit_stream_to_length, fit_to_length, require_domains
from daekit.errors import UserError
from daekit.metrics import TokenMeans
from daekit.models.backbone import add_on_hidden, kept_hidden_states
from daekit.protocol import Batch, packed_lengths
from tests import reference, tiny

datasets.disable_progress_bars()

LAYOUTS = ("right", "left", "packed", "packed to 8", "blocks")
Row = dict[str, Any]


def make_rows(seed: int, count: int, longest: int = 9) -> list[Row]:
    """Token rows of 2 tokens and more with a response somewhere, and a domain each."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = [rng.randrange(3, 43) for _ in range(rng.randint(2, longest))]
        labels = [token if rng.random() < 0.6 else -100 for token in ids]
        rows.append({"input_ids": ids, "labels": labels, "domain": rng.choice(["general", "shop", "law"])})
    return rows


def pad_left(examples: list[Row]) -> dict[str, Tensor]:
    """A collator of a user's own, of the kind that generation needs."""
    longest = max(len(example["input_ids"]) for example in examples)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    examples = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in examples]
    return {
        key: torch.tensor([[value] * (longest - len(example[key])) + example[key] for example in examples])
        for key, value in fill.items()
    }


def collate(rows: Sequence[Row], layout: str) -> Batch:
    examples = list(rows)
    if layout == "blocks":  # as packing makes them: rows of one domain in one example
        examples = []
        for domain in dict.fromkeys(row["domain"] for row in rows):
            mine = [row for row in rows if row["domain"] == domain]
            joined = {key: list(itertools.chain(*(row[key] for row in mine))) for key in ("input_ids", "labels")}
            examples.append(joined | {"domain": domain, "seq_lengths": [len(row["input_ids"]) for row in mine]})
    multiple = 8 if layout == "packed to 8" else None
    padding_free = layout not in ("right", "left")
    inner = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free, pad_to_multiple_of=multiple)
    return as_batch(DomainCollator(pad_left if layout == "left" else inner)(examples))


def in_order(rows: list[Row], layout: str) -> list[Row]:
    """The rows in the order of their index in the batch."""
    return sorted(rows, key=lambda row: [r["domain"] for r in rows].index(row["domain"])) if layout == "blocks" else rows


# ---- the shift ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), layout=st.sampled_from(LAYOUTS))
def test_kept_positions_equal_a_loop_over_rows(seed: int, count: int, layout: str) -> None:
    """Whatever the layout: each token of a response but a row's first, predicted from the token before it of the same row."""
    rows = in_order(make_rows(seed, count), layout)
    batch = collate(rows, layout)
    expected = [
        (row["input_ids"][t], token, index)
        for index, row in enumerate(rows)
        for t, token in enumerate(row["labels"][1:])
        if token != -100
    ]
    before = batch.keep(batch.inputs["input_ids"][..., None].float()).squeeze(-1).long()
    assert list(zip(before.tolist(), batch.labels_N.tolist(), batch.row_N.tolist(), strict=True)) == expected
    assert batch.domains == tuple(row["domain"] for row in rows)
    assert [(token, row) for _, _, token, row in reference.kept(batch.labels_BT.tolist(), batch.row_BT.tolist())] == [
        (token, row) for _, token, row in expected
    ]


def test_the_first_token_of_a_response_is_kept() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9], "domain": "shop"}
    batch = collate([row], "right")
    assert batch.kept_BT.tolist() == [[False, False, True, True]]
    assert batch.labels_N.tolist() == [8, 9]


def test_padding_belongs_to_no_row() -> None:
    rows = make_rows(1, 4)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert tokens % 8  # so that there is padding in every layout but two
    for layout in LAYOUTS:
        row_BT = collate(rows, layout).row_BT
        assert int((row_BT >= 0).sum()) == tokens
        assert (row_BT == -1).any() == (layout not in ("packed", "blocks"))


def test_a_collator_without_labels_is_an_error() -> None:
    with pytest.raises(UserError, match="returned no labels"):
        DomainCollator(lambda examples: {"input_ids": torch.zeros(1, 1)})([{"input_ids": [1], "domain": "shop"}])


# ---- selection --------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), layout=st.sampled_from(LAYOUTS), data=st.data())
def test_selection_keeps_the_positions_that_it_names(seed: int, count: int, layout: str, data: st.DataObject) -> None:
    batch = collate(make_rows(seed, count), layout)
    rows = sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1)))
    part, positions = batch.select(rows), batch.positions_of(rows)
    assert part.domains == tuple(batch.domains[row] for row in rows)
    assert torch.equal(part.labels_N, batch.labels_N[positions])
    assert [rows[row] for row in part.row_N.tolist()] == batch.row_N[positions].tolist()
    tokens = {row: batch.inputs["input_ids"][batch.row_BT == row].tolist() for row in rows}
    assert {rows[row]: part.inputs["input_ids"][part.row_BT == row].tolist() for row in range(len(rows))} == tokens
    assert sorted(batch.positions_of(range(count)).tolist()) == list(range(batch.labels_N.numel()))
    if layout not in ("right", "left"):  # as if the rows had been collated without the others
        assert part.inputs["cu_seq_lens_q"][-1] == part.labels_BT.shape[1]


@pytest.mark.parametrize("multiple", [None, 8])
def test_lengths_of_packed_rows_are_those_of_trl(multiple: int | None) -> None:
    examples = [{key: row[key] for key in ("input_ids", "labels")} for row in make_rows(3, 4)]
    collated = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=multiple)(examples)
    ours = packed_lengths(collated["position_ids"])
    assert set(ours) == set(collated) - {"input_ids", "labels", "position_ids"}
    for key, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(collated[key])), key


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_says_the_same_alone_in_a_batch_and_in_a_selection(layout: str, kind: str, window: int | None) -> None:
    """Through real models: no row sees another, or padding, whatever is selected with it."""
    rows = in_order(make_rows(5, 4), layout)
    model = tiny.model(kind, sliding_window=window).eval()
    plain = model.base_model
    add_on_hidden(model)
    batch = collate(rows, layout)
    with torch.no_grad():
        whole = kept_hidden_states(model, batch)
        alone = []
        for row in rows:
            hidden = plain(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
            alone += [hidden[t] for t, token in enumerate(row["labels"][1:]) if token != -100]
        torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-4, atol=1e-5)
        for size in range(1, len(rows) + 1):
            for chosen in itertools.combinations(range(len(rows)), size):
                part = kept_hidden_states(model, batch.select(chosen))
                torch.testing.assert_close(part, whole[batch.positions_of(chosen)], rtol=1e-4, atol=1e-5)


# ---- overlong rows ----------------------------------------------------------------------------------------------------------

_tokens = st.lists(st.booleans(), min_size=1, max_size=7)  # of each token: has it a label?
_rows = st.lists(st.tuples(st.sampled_from(["general", "shop"]), _tokens), min_size=1, max_size=8)


def tokenised(rows: Sequence[tuple[str, Sequence[bool]]]) -> Dataset:
    return Dataset.from_list(
        [
            {"input_ids": list(range(3, 3 + len(t))), "labels": [i + 3 if x else -100 for i, x in enumerate(t)], "domain": d}
            for d, t in rows
        ]
    )


def fate(tokens: Sequence[bool], limit: int, overlong: str) -> tuple[str, Sequence[bool]]:
    """What becomes of one row, told in words, and what is left of it."""
    if not any(tokens[1:]):
        return "blank", []
    if len(tokens) <= limit:
        return "rows", tokens
    if overlong == "drop":
        return "dropped", []
    return ("truncated", tokens[:limit]) if any(tokens[1:limit]) else ("emptied", [])


@settings(max_examples=40, deadline=None)
@given(rows=_rows, limit=st.one_of(st.none(), st.integers(1, 7)), overlong=st.sampled_from(["truncate", "drop", "error"]))
def test_counts_equal_a_recount(rows: list[tuple[str, list[bool]]], limit: int | None, overlong: str) -> None:
    size = 99 if limit is None else limit
    domains = list(dict.fromkeys(domain for domain, _ in rows))
    fates = [(domain, *fate(tokens, size, overlong)) for domain, tokens in rows]
    left = [(domain, tokens) for domain, _, tokens in fates if tokens]
    dataset = tokenised(rows)
    if overlong == "error" and any(len(tokens) > size for _, tokens in rows):
        with pytest.raises(UserError, match=f"{sum(len(t) > size for _, t in rows)} of {len(rows)} rows"):
            fit_to_length(dataset, limit, overlong, "train")
        return
    if {domain for domain, _ in left} != set(domains):
        with pytest.raises(UserError, match="loses all its"):
            fit_to_length(dataset, limit, overlong, "train")
        return
    result, counts = fit_to_length(dataset, limit, overlong, "train")
    for domain in domains:
        mine = [(what, tokens) for d, what, tokens in fates if d == domain]
        for what in ("truncated", "dropped", "emptied", "blank"):
            assert getattr(counts[domain], what) == sum(w == what for w, _ in mine), what
        assert counts[domain].rows == sum(bool(tokens) for _, tokens in mine)
        assert counts[domain].kept_tokens == sum(sum(tokens[1:]) for _, tokens in mine)
    expected = tokenised(left)
    assert result["input_ids"] == expected["input_ids"] and result["labels"] == expected["labels"]
    assert result["domain"] == expected["domain"]
    stream = fit_stream_to_length(dataset.to_iterable_dataset(), limit, overlong, "train")
    assert [row["labels"] for row in stream] == list(expected["labels"])


def test_counts_of_more_than_one_batch_of_a_selection() -> None:
    """Rows are measured a thousand at a time, and a selected data set is not contiguous in memory."""
    rng = random.Random(0)
    rows = [("shop", [rng.random() < 0.5 for _ in range(rng.randint(1, 6))]) for _ in range(2500)]
    chosen = rng.sample(range(2500), 1700)
    _, counts = fit_to_length(tokenised(rows).select(chosen), 4, "truncate", "train")
    fates = [fate(rows[i][1], 4, "truncate") for i in chosen]
    assert counts["shop"].kept_tokens == sum(sum(tokens[1:]) for _, tokens in fates)
    assert counts["shop"].truncated == sum(what == "truncated" for what, _ in fates)


def test_overlong_error_names_domains_and_the_longest_row() -> None:
    dataset = tokenised([("shop", [True] * 3), ("general", [True] * 9), ("shop", [True] * 12)])
    with pytest.raises(UserError, match=r"max_length=4 .*general: 1, shop: 1; the longest is row 2 with 12"):
        fit_to_length(dataset, 4, "error", "train")


def test_a_domain_that_loses_all_its_rows_says_why() -> None:
    dataset = tokenised([("general", [True] * 3), ("shop", [False] * 3), ("shop", [False] * 4 + [True])])
    with pytest.raises(
        UserError, match=r"'shop' loses all its 2 rows \(1 have nothing.*1 lose their whole response at max_length=4"
    ):
        fit_to_length(dataset, 4, "truncate", "train")


def test_an_empty_data_set_is_an_error() -> None:
    with pytest.raises(UserError, match="empty"):
        require_domains(tokenised([("shop", [True] * 3)]).select([]), "train", "general")


def test_a_stream_names_the_row_that_is_too_long() -> None:
    stream = tokenised([("shop", [True] * 3), ("shop", [True] * 6)]).to_iterable_dataset()
    with pytest.raises(UserError, match=r"row 1 \(domain 'shop'\): 6 tokens, more than max_length=4"):
        list(fit_stream_to_length(stream, 4, "error", "train"))


@pytest.mark.parametrize(
    ("overlong", "expected"),
    [
        ("drop", ["row 1 (domain 'shop'): left out, for it has nothing", "row 2 (domain 'shop'): left out, for it is longer"]),
        ("truncate", ["row 1 (domain 'shop'): left out, for it has nothing", "row 2 (domain 'shop'): cut at", "row 4 "]),
    ],
)
def test_a_stream_says_what_it_leaves_out_or_cuts(overlong: str, expected: list[str], caplog: Any) -> None:
    """The first row of each kind and domain, and once only."""
    long, emptied = [True] * 6, [False] * 4 + [True]
    rows = [
        ("shop", [True] * 3),
        ("shop", [False] * 3),
        ("shop", long),
        ("shop", long),
        ("general", emptied),
        ("shop", [False]),
    ]
    stream = fit_stream_to_length(tokenised(rows).to_iterable_dataset(), 4, overlong, "train")
    for _ in range(2):
        assert [len(row["input_ids"]) for row in stream] == ([3, 4, 4] if overlong == "truncate" else [3])
    said = [record.message for record in caplog.records if record.name == "daekit.data.preparation"]
    expected = expected if overlong == "truncate" else [*expected, "row 4 (domain 'general'): left out, for it is longer"]
    assert len(said) == len(expected)
    assert all(words in message for words, message in zip(expected, said, strict=True))


def test_domains_are_required_or_filled_in() -> None:
    bare = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    with pytest.raises(UserError, match="no column 'domain'"):
        require_domains(bare, "train", None)
    assert require_domains(bare, "train", "general")["domain"] == ["general", "general"]
    stream = require_domains(bare.to_iterable_dataset(), "train", "general")
    assert isinstance(stream, IterableDataset) and [row["domain"] for row in stream] == ["general", "general"]
    with pytest.raises(UserError, match="row 1: domain is None"):
        require_domains(Dataset.from_list([{"domain": "shop"}, {"domain": None}]), "train", "general")
    with pytest.raises(UserError, match="row 0: domain is 1"):
        require_domains(Dataset.from_list([{"domain": 1}]), "train", None)


# ---- metrics ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_token_means_are_means_over_tokens(data: st.DataObject) -> None:
    """Batches of different sizes: a mean of means would be another number."""
    means, seen = TokenMeans(), []
    for _ in range(data.draw(st.integers(1, 4))):
        domains = data.draw(st.lists(st.sampled_from(["general", "shop"]), min_size=1, max_size=3))
        rows = data.draw(st.lists(st.integers(0, len(domains) - 1), max_size=6))
        values = data.draw(st.lists(st.floats(-5, 5, width=32), min_size=len(rows), max_size=len(rows)))
        means.add("kl", torch.tensor(values), torch.tensor(rows, dtype=torch.long), domains)
        seen += [(domains[row], value) for row, value in zip(rows, values, strict=True)]
        state = json.loads(json.dumps(means.state()))
        means = TokenMeans()
        means.load(state)  # a resume in the middle changes nothing
        assert means.state() == state
    popped = means.pop()
    for key, mine in [("kl", seen), *((f"kl/{d}", [x for x in seen if x[0] == d]) for d in ("general", "shop"))]:
        assert (key in popped) == bool(mine)
        if mine:
            assert popped[key][1] == len(mine)
            assert popped[key][0] == pytest.approx(sum(value for _, value in mine) / len(mine), rel=1e-12, abs=1e-12)
    assert means.pop() == {}


def test_a_resumed_sum_is_the_same_to_the_bit() -> None:
    straight, resumed = TokenMeans(), TokenMeans()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        values, rows = torch.randn(50, generator=generator), torch.randint(0, 2, (50,), generator=generator)
        straight.add("ce", values, rows, ["general", "shop"])
        again = TokenMeans()
        again.load(json.loads(json.dumps(resumed.state())))
        resumed = again
        resumed.add("ce", values, rows, ["general", "shop"])
    assert straight.pop() == resumed.pop()
