"""Mixtures: shares add up exactly, nothing is repeated or lost without need, and a seed decides everything."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from daekit.data.mixture import mix
from daekit.errors import UserError
from daekit.recipe.schema import MixtureSpec


def source(name: str, rows: int) -> Dataset:
    return Dataset.from_dict({"text": [f"{name}{i}" for i in range(rows)], "domain": [name] * rows})


sizes_and_weights = st.lists(
    st.tuples(st.integers(1, 40), st.decimals("0.01", "3", places=2).map(float)), min_size=1, max_size=4
)


@settings(max_examples=40, deadline=None)
@given(parts=sizes_and_weights, rows=st.none() | st.integers(1, 150), seed=st.integers(0, 2**32))
def test_counts_of_a_weighted_mixture(parts: list[tuple[int, float]], rows: int | None, seed: int) -> None:
    names = tuple("abcd"[: len(parts)])
    sources = {name: source(name, size) for name, (size, _) in zip(names, parts, strict=True)}
    spec = MixtureSpec(sources=names, weights=tuple(weight for _, weight in parts), rows=rows)
    whole = sum(Fraction(str(weight)) for _, weight in parts)
    shares = [Fraction(str(weight)) / whole for _, weight in parts]
    most = min(size / share for (size, _), share in zip(parts, shares, strict=True)) // 1
    try:
        mixture = mix(sources, spec, seed)
    except UserError as error:
        assert "is not one row" in str(error)
        assert any(share * (rows or most) < 1 for share in shares)
        return
    used = Counter(mixture.dataset["domain"][:])
    total = rows or most
    assert sum(used.values()) == total == len(mixture.dataset)
    for use, (size, _), share in zip(mixture.table, parts, shares, strict=True):
        assert use.used == used[use.source] > 0 and use.available == size
        assert abs(use.used - share * total) < 1
        assert use.share == pytest.approx(use.used / total) and use.repeats == pytest.approx(use.used / size)
        times = Counter(text for text in mixture.dataset["text"] if text.startswith(use.source))
        assert set(times.values()) <= {use.used // size, use.used // size + 1}
        assert len(times) == min(size, use.used)
        if rows is None:
            assert use.used <= size
    if rows is None:  # one row more would repeat a row
        assert any(share * (total + 1) > size for (size, _), share in zip(parts, shares, strict=True))


@pytest.mark.parametrize("percent", [7, 28, 44])
def test_shares_are_exact(percent: int) -> None:
    """In floating point these lose a row: the quotient comes out just below 100."""
    sources = {"a": source("a", percent), "b": source("b", 100 - percent)}
    mixture = mix(sources, MixtureSpec(sources=("a", "b"), weights=(percent / 100, (100 - percent) / 100)), 0)
    assert [use.used for use in mixture.table] == [percent, 100 - percent]


def test_rows_that_are_left_over_go_to_the_largest_remainders() -> None:
    """3.1, 3.3 and 3.6 rows of ten; 2.9, 3.3 and 3.8."""
    sources = {name: source(name, 10) for name in "abc"}
    for weights, wanted in (((0.31, 0.33, 0.36), [3, 3, 4]), ((0.29, 0.33, 0.38), [3, 3, 4]), ((0.36, 0.31, 0.33), [4, 3, 3])):
        mixture = mix(sources, MixtureSpec(sources=("a", "b", "c"), weights=weights, rows=10), 0)
        assert [use.used for use in mixture.table] == wanted


def test_a_list_is_every_row_once_in_a_seeded_order() -> None:
    sources = {"a": source("a", 30), "b": source("b", 20), "unused": source("c", 5)}
    spec = MixtureSpec(sources=("b", "a"))
    mixture = mix(sources, spec, 3)
    texts = mixture.dataset["text"][:]
    assert sorted(texts) == sorted(sources["a"]["text"][:] + sources["b"]["text"][:])
    assert texts != sources["b"]["text"][:] + sources["a"]["text"][:]
    assert mix(sources, spec, 3).dataset["text"][:] == texts
    assert mix(sources, spec, 4).dataset["text"][:] != texts
    assert [(use.source, use.used, use.repeats) for use in mixture.table] == [("b", 20, 1.0), ("a", 30, 1.0)]
    assert set(mixture.dataset.column_names) == {"text", "domain"}


def test_the_rows_chosen_from_a_source_do_not_depend_on_the_others() -> None:
    a, b, c = source("a", 50), source("b", 50), source("c", 50)

    def chosen(sources: dict[str, Dataset], rows: int, seed: int = 0) -> set[str]:
        names = tuple(sources)
        mixture = mix(sources, MixtureSpec(sources=names, weights=(1 / len(names),) * len(names), rows=rows), seed)
        return {text for text in mixture.dataset["text"] if text.startswith("a")}

    assert chosen({"a": a, "b": b}, 20) == chosen({"c": c, "b": b, "a": a}, 30)
    assert chosen({"a": a, "b": b}, 20) != chosen({"a": a, "b": b}, 20, seed=1)
    assert chosen({"a": a, "b": b}, 20) != {f"a{i}" for i in range(10)}


def test_sources_of_equal_size_give_rows_of_their_own_choice() -> None:
    """Data sets with parallel rows would otherwise always give the same ones."""
    mixture = mix({"a": source("a", 50), "b": source("b", 50)}, MixtureSpec(sources=("a", "b"), weights=(1.0, 1.0), rows=20), 0)
    texts = mixture.dataset["text"][:]
    assert {text[1:] for text in texts if text[0] == "a"} != {text[1:] for text in texts if text[0] == "b"}


def test_selected_rows_are_mixed_as_they_were_selected() -> None:
    part = source("a", 100).select([5, 50, 7])
    assert sorted(mix({"a": part}, MixtureSpec(sources=("a",)), 0).dataset["text"]) == ["a5", "a50", "a7"]


def test_a_source_without_a_row_is_an_error() -> None:
    with pytest.raises(UserError, match=r"data.b: a share of 0.01 of 20 rows is not one row"):
        mix({"a": source("a", 30), "b": source("b", 30)}, MixtureSpec(sources=("a", "b"), weights=(0.99, 0.01), rows=20), 0)
