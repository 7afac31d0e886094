"""Every family in the table of docs/families.md: each loss is the truth in float64, or refused as the table says."""

from __future__ import annotations

import pytest

from tests.helpers import families
from tests.helpers.family_audit import audit, rows_of_page

_FEW = ("llama", "gemma2", "gpt_oss", "olmo_hybrid")  # plain; capped; sinks; a hybrid


@pytest.mark.parametrize("family", _FEW)
def test_a_few_families(family: str) -> None:
    assert audit(family) == rows_of_page()[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted({*families.FAMILIES, *families.WITH_VISION} - {*_FEW}))
def test_a_family(family: str) -> None:
    """A row that is not so any more is written anew by ``python -m tests.helpers.family_audit``."""
    assert audit(family) == rows_of_page()[family]


def test_the_table_has_all_families() -> None:
    assert rows_of_page().keys() == {*families.FAMILIES, *families.WITH_VISION}
