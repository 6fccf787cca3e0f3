import itertools

import pytest

from harness.errors import UsageError
from harness.space import Config, Param, Rule, Space


def small_space() -> Space:
    return Space(
        params=(
            Param("block_m", (16, 32, 64), "rows of a tile"),
            Param("block_n", (16, 32), "columns of a tile"),
            Param("num_warps", (4, 8), "warps of a program", interpreted=False),
        ),
        rules=(
            Rule("wide", "m must not be below n", lambda config: config["block_m"] >= config["block_n"]),
            Rule("warps", "8 warps need 64 rows", lambda config: config["num_warps"] == 4 or config["block_m"] == 64),
        ),
    )


def test_census_charges_each_config_to_the_first_rule_and_counts_each_rule_alone() -> None:
    census = small_space().census
    assert census.size == 12
    assert census.pruned == {"wide": 2, "warps": 3}
    assert census.alone == {"wide": 2, "warps": 4}
    assert census.legal == census.size - sum(census.pruned.values())


def test_legal_is_what_the_rules_allow() -> None:
    space = small_space()
    every = [
        Config(dict(zip(space.names, values, strict=True)))
        for values in itertools.product((16, 32, 64), (16, 32), (4, 8))
    ]
    assert list(space.legal) == [config for config in every if space.broken_rule(config) is None]


def test_interpreted_leaves_out_what_the_interpreter_does_not_see() -> None:
    assert small_space().interpreted == ("block_m", "block_n")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"block_m": 16, "block_n": 16}, "gives no `num_warps`"),
        ({"block_m": 16, "block_n": 16, "num_warp": 4}, "no parameter `num_warp`"),
        ({"block_m": 17, "block_n": 16, "num_warps": 4}, "`block_m` cannot be 17"),
        ({"block_m": 16, "block_n": 32, "num_warps": 4}, "breaks the rule `wide`: m must not be below n"),
    ],
)
def test_check_says_why_a_config_is_no_member(config: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small_space().check(config)


def test_configs_are_values() -> None:
    one, other = Config({"a": 1, "b": 2}), Config({"b": 2, "a": 1})
    assert one == other
    assert hash(one) == hash(other)
    assert one != Config({"a": 1, "b": 3})
    assert str(one) == "a=1 b=2"


def test_fingerprint_changes_with_the_legal_configs_only() -> None:
    space = small_space()
    stricter = Space(space.params, (*space.rules, Rule("no 16", "for the test", lambda config: config["block_m"] > 16)))
    reworded = Space(space.params, tuple(Rule(rule.name, "other words", rule.holds) for rule in space.rules))
    assert space.fingerprint != stricter.fingerprint
    assert space.fingerprint == reworded.fingerprint


def test_names_must_be_distinct() -> None:
    with pytest.raises(UsageError, match="two parameters named `a`"):
        Space((Param("a", (1,), ""), Param("a", (2,), "")), ())
    with pytest.raises(UsageError, match="distinct values"):
        Param("a", (1, 1), "")


def test_enumeration_is_the_same_as_going_through_everything() -> None:
    """Rules that read one parameter, several, some of them only sometimes, and none; also with `get`."""
    names = ("a", "b", "c", "d")
    params = tuple(Param(name, tuple(range(place + 2)), "") for place, name in enumerate(names))
    rules = (
        Rule("last", "", lambda config: config["d"] != 3),
        Rule("sometimes", "", lambda config: config["c"] == 0 or config["b"] < 2),
        Rule("get", "", lambda config: config.get("a") == 0 or config["d"] > 0),
        Rule("always", "", lambda config: True),
    )
    space = Space(params, rules)
    every = [
        Config(dict(zip(names, values, strict=True)))
        for values in itertools.product(*(param.values for param in params))
    ]
    assert list(space.legal) == [config for config in every if space.broken_rule(config) is None]
    census = space.census
    assert census.size == len(every) == census.legal + sum(census.pruned.values())
    assert census.alone == {rule.name: sum(not rule.holds(config) for config in every) for rule in rules}


@pytest.mark.parametrize(
    "names", [("block_m", "block_n"), ("num_warps",), ("block_n",), ("block_m", "block_n", "num_warps")]
)
def test_distinct_is_the_first_of_all_that_agree(names: tuple[str, ...]) -> None:
    space = small_space()
    expected = {config.restricted(names): config for config in reversed(space.legal)}
    found = space.distinct(names)
    assert {config.restricted(names): config for config in found} == expected and len(found) == len(expected)
    assert all(space.check(config) == config and list(config) == list(space.names) for config in found)


def test_a_limited_space_has_the_legal_configs_with_those_values() -> None:
    space = small_space()
    least = min(param.values for param in space.params if param.name == "block_m")[0]
    limited = space.limited(lambda name, value: name != "block_m" or value == least)
    assert list(limited.legal) == [config for config in space.legal if config["block_m"] == least]
    assert 0 < len(limited.legal) < len(space.legal)


def test_what_one_rule_removes_is_not_gone_through() -> None:
    """A rule that removes everything at the first parameter is asked about that one only, and charged with all below."""
    asked: list[str] = []

    def none_of(config: Config) -> bool:
        asked.append("early")
        return config["first"] == 7

    def late(config: Config) -> bool:
        asked.append("late")
        return config["last"] == 0

    params = (Param("first", (1, 2), ""), *(Param(f"more{i}", tuple(range(100)), "") for i in range(8)))
    space = Space((*params, Param("last", (0, 1), "")), (Rule("early", "", none_of), Rule("late", "", late)))
    assert not space.legal
    assert space.census.pruned == {"early": 4 * 100**8, "late": 0}
    assert space.census.alone == {"early": 4 * 100**8, "late": 2 * 100**8}
    assert len(asked) < 20


def test_a_rule_that_reads_no_parameter_of_the_space_is_a_bug() -> None:
    with pytest.raises(KeyError, match="width"):
        _ = Space((Param("a", (1, 2), ""),), (Rule("wrong", "", lambda config: config["width"] > 0),)).legal
