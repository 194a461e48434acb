"""Who is held out of training."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from torch_molere.arguments import check_count
from torch_molere.validation import held_out
from torch_molere.validation.source import ValidationSource


@given(st.lists(st.tuples(st.integers(0, 6), st.booleans()), max_size=12))
def test_a_row_sent_anywhere_is_held_out_everywhere(instances):
    rows, sent = [row for row, _ in instances], [is_sent for _, is_sent in instances]
    mask = held_out(rows, sent)
    wanted = [any(s and r == row for r, s in instances) for row in rows]
    if instances and all(wanted):
        assert mask.count(False) == 1  # somebody is trained on
        free = mask.index(False)
        assert not sent[free] or all(sent)
    else:
        assert mask == wanted


def test_without_rows_an_instance_is_held_out_where_it_was_sent():
    assert held_out(None, [True, False, False]) == [True, False, False]
    assert held_out(None, [True, True]) == [False, True]
    assert held_out(None, []) == held_out([], []) == []


def test_the_other_position_of_a_row_is_the_one_that_stays():
    assert held_out([7, 7], [True, False]) == [True, False]
    assert held_out([7, 8, 7], [True, False, False]) == [True, False, True]


def test_a_source_sends_nothing_unless_it_says_so():
    source = ValidationSource()
    assert source.probabilities(None, False) is None
    assert source.choose(None, None, None, None, {}) == []
    assert source.metrics() == {}


@pytest.mark.parametrize("value", [-1, True, 1.0, None, "3"])
def test_integers(value):
    with pytest.raises(ValueError, match="count must be an integer ≥ 0, got"):
        check_count("count", value, 0)
