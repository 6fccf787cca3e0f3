"""The fewest configs that serve all problems, checked against trying every subset."""

import itertools

import hypothesis.strategies as st
import pytest
from hypothesis import given

from harness import portfolio
from harness.portfolio import WITHIN, smallest_portfolio
from harness.space import Config

CONFIGS = [Config({"c": number}) for number in range(6)]
ratios = st.sampled_from([1.0, 1.01, 1 + WITHIN, 1.03, 2.0])
tables = st.dictionaries(
    st.sampled_from([f"problem {number}" for number in range(5)]),
    st.dictionaries(st.sampled_from(CONFIGS), ratios, max_size=6),
    min_size=1,
)


def fewest_by_trying(table):
    servable = {p: {c for c, r in found.items() if r <= 1 + WITHIN} for p, found in table.items()}
    wanted = [served for served in servable.values() if served]
    for size in range(len(CONFIGS) + 1):
        for some in itertools.combinations(CONFIGS, size):
            if all(served & set(some) for served in wanted):
                return size
    raise AssertionError


@given(tables)
def test_no_fewer_configs_serve_all_problems(table):
    found = smallest_portfolio(table)
    assert found.exact
    assert len(found.members) == fewest_by_trying(table)
    served = {problem for member in found.members for problem in member.serves}
    assert served | set(found.unserved) == set(table)
    for member in found.members:
        for problem, ratio in member.serves.items():
            assert ratio == table[problem][member.config] <= 1 + WITHIN
            assert ratio == min(table[problem].get(other.config, 9) for other in found.members)


def test_of_equally_few_the_fastest_over_all_win():
    table = {"p": {CONFIGS[0]: 1.02, CONFIGS[1]: 1.01}, "q": {CONFIGS[0]: 1.0, CONFIGS[1]: 1.0}}
    (member,) = smallest_portfolio(table).members
    assert member.config == CONFIGS[1]


def test_what_was_tried_nowhere_serves_nothing():
    found = smallest_portfolio({"p": {CONFIGS[0]: 1.0}, "q": {}, "r": {CONFIGS[0]: 1.5}})
    assert found.unserved == ("q", "r")
    assert [dict(member.serves) for member in found.members] == [{"p": 1.0}]


@given(tables)
def test_the_greedy_choice_keeps_its_promise(table):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(portfolio, "_EXACT", -1)
        found = smallest_portfolio(table)
    assert not found.exact
    assert len(found.members) <= found.bound * fewest_by_trying(table) or not found.members
    assert {p for member in found.members for p in member.serves} | set(found.unserved) == set(table)
