"""Every published field is used, refused by its name, or known to change nothing, in every file format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.fields_table import HARMLESS, document, table


@pytest.fixture(scope="module")
def found():
    return table()


def test_no_field_that_changes_what_is_learned_is_dropped(found):
    dropped = {
        (place, field): outcomes
        for place, field, _, outcomes in found
        if set(outcomes) - {"used", "refused"} and not (set(outcomes) == {"not read"} and field in HARMLESS[place])
    }
    assert not dropped, dropped


def test_the_page_says_what_the_readers_do():
    page = Path(__file__).parents[2] / "docs" / "data_fields.md"
    assert page.read_text(encoding="utf-8") == document(), "write it again: python -m tests.data.fields_table"
