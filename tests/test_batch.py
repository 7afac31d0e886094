"""The way of a batch: collation, the one shift, selection of rows, token means."""

from __future__ import annotations

import itertools
import json

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from daekit.data.collator import DomainCollator
from daekit.errors import UserError
from daekit.metrics import TokenMeans
from daekit.models.backbone import add_on_hidden, hidden_at_loss_positions
from daekit.protocol import packed_lengths
from tests import reference
from tests.helpers import tiny
from tests.helpers.batches import Row, collate, make_rows

datasets.disable_progress_bars()

LAYOUTS = ("right", "left", "packed", "packed to 8", "blocks")


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
    before = batch.at_loss_positions(batch.inputs["input_ids"][..., None].float()).squeeze(-1).long()
    assert list(zip(before.tolist(), batch.labels_N.tolist(), batch.row_N.tolist(), strict=True)) == expected
    assert batch.domains == tuple(row["domain"] for row in rows)
    assert [(token, row) for _, _, token, row in reference.kept(batch.labels_BT.tolist(), batch.row_BT.tolist())] == [
        (token, row) for _, token, row in expected
    ]


def test_the_first_token_of_a_response_is_kept() -> None:
    row = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, -100, 8, 9], "domain": "shop"}
    batch = collate([row], "right")
    assert batch.loss_mask_BT.tolist() == [[False, False, True, True]]
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
        whole = hidden_at_loss_positions(model, batch)
        alone = []
        for row in rows:
            hidden = plain(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state[0]
            alone += [hidden[t] for t, token in enumerate(row["labels"][1:]) if token != -100]
        torch.testing.assert_close(whole, torch.stack(alone), rtol=1e-4, atol=1e-5)
        for size in range(1, len(rows) + 1):
            for chosen in itertools.combinations(range(len(rows)), size):
                part = hidden_at_loss_positions(model, batch.select(chosen))
                torch.testing.assert_close(part, whole[batch.positions_of(chosen)], rtol=1e-4, atol=1e-5)


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
