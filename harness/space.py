"""Search spaces: parameters, named rules, and the configs that every rule allows.

Refuses to know what a kernel does: a space is data. Refuses duplicate names, empty parameters, and unknown configs.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.errors import UsageError, did_you_mean

Value = int | str | bool


@functools.cache
def power_of_two(number: int) -> int:
    """The least power of two that is not less than `number`."""
    return 1 << max(number - 1, 0).bit_length()


@functools.cache
def padded(head_dim: int) -> int:
    """Columns of a tile that holds a whole head: a power of two, and what a matrix instruction takes at least."""
    return max(16, power_of_two(head_dim))


class Config(Mapping[str, Value]):
    """An immutable, hashable assignment of values to parameters, in the order of the space."""

    __slots__ = ("_items", "_values")

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)
        self._items = tuple(self._values.items())

    def __getitem__(self, name: str) -> Value:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._items))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self._values == other._values

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self._items)

    def __repr__(self) -> str:
        return f"Config({self})"

    def restricted(self, names: Sequence[str]) -> "Config":
        """The same config with only the parameters in `names`."""
        return Config({name: self._values[name] for name in self._values if name in names})


@dataclass(frozen=True, slots=True)
class Param:
    """A tunable: its name, its values in a meaningful order, and one sentence why it may pay.

    `interpreted` says whether Triton's interpreter sees it: block sizes yes, warps and stages no. Configs that differ
    only in what the interpreter does not see compute the same there, and share one verdict.
    """

    name: str
    values: tuple[Value, ...]
    why: str
    interpreted: bool = True

    def __post_init__(self) -> None:
        if not self.values or len(set(map(repr, self.values))) != len(self.values):
            raise UsageError(f"parameter `{self.name}` needs distinct values, found {self.values}")


@dataclass(frozen=True, slots=True)
class Rule:
    """A named legality rule: `holds(config)` is False for the configs that it removes; `why` is one sentence.

    It must read parameters by name and nothing else of the config: an enumeration asks it as soon as those are known.
    """

    name: str
    why: str
    holds: Callable[[Config], bool]


@functools.cache
def tile_width(head_dim: int, *, chunked: object) -> int:
    """Columns of a head with their padding, in one tile or, if `chunked`, in two where these are narrower."""
    first = power_of_two(head_dim + 1) // 2
    halves = first + padded(head_dim - first)
    return min(halves, padded(head_dim)) if chunked and head_dim > first >= 16 else padded(head_dim)


def eight_bits(multiplied: bool) -> Rule:
    """The rule of numbers of 8 bits, by whether a device multiplies them."""
    return Rule(
        "eight_bits",
        "matrix units take numbers of 8 bits from sm_89 on (CDNA 3 has others), and sum at least 32 of them",
        lambda config: multiplied and int(config["block_n"]) >= 32,
    )


def matrix_knobs(cdna: bool) -> tuple[Param, ...]:
    """Tunables of AMD's matrix instructions; one value each where there are none."""
    return (
        Param(
            "mfma_side", (0, 16) if cdna else (0,),
            "instructions of 16 rows hold fewer sums each than the compiler's of 32, in more of them", interpreted=False,
        ),
        Param("kpack", (1, 2) if cdna else (1,), "operands fetched two at a time take fewer instructions", interpreted=False),
    )  # fmt: skip


def matrix_rule(rows: Callable[[Config], int]) -> Rule:
    """The rule of `mfma_side`, by how many rows the largest tile of sums has."""
    return Rule(
        "mfma_side",
        "tiles of 16 rows are multiplied 16 by 16 anyway",
        lambda config: not config["mfma_side"] or rows(config) >= 32,
    )


SCALED_QUERIES = Param(
    "scaled_queries", (False, True), "queries multiplied with the scale once spare a product for each score"
)


def exact_scale(dtype: str, scale: float, *, changed: bool) -> Rule:
    """The rule of `scaled_queries`. `changed`: whether scores are changed before they meet log2(e). Else that is part of the
    factor, whose product is fused with a sum and costs nothing. Of any other scale, bf16 rounds each query by up to 2^-9: scores
    of 10 would be off by 0.02, where a log-sum-exp may be off by 1e-5."""
    exact = dtype in ("bf16", "fp32") and 2.0**-64 <= abs(scale) <= 1 and abs(math.frexp(scale)[0]) == 0.5
    return Rule(
        "scaled_queries",
        "spares a product only of scores that are changed, and rounds queries no further, as bounds want it, only by a power of"
        " two of at most 1 and not in fp16, whose exponents end early",
        lambda config: not config["scaled_queries"] or (exact and changed),
    )


@dataclass(frozen=True, slots=True)
class Apart:
    """Launches that do not interact in the configs which have the values `when`: they run one after the other, and each is
    decided by tunables of its own. `kernels` are those of each launch (one or more, whose times belong together), by name, and
    `tunables` what decides them; what is in none of these must be the same where the times of two configs are put together."""

    when: Mapping[str, Value]
    kernels: Mapping[str, tuple[str, ...]]
    tunables: Mapping[str, tuple[str, ...]]

    def holds(self, config: Mapping[str, Value]) -> bool:
        return all(config[name] == value for name, value in self.when.items())


@dataclass(frozen=True, slots=True)
class Census:
    """Count of a space: `size` combinations, `legal` ones, and how many each rule removed.

    `pruned` charges a config to the first rule that can tell, parameter by parameter in the order of the space, and among
    those in the order of the rules, so size = legal + sum(pruned). `alone` counts for each rule all that it would remove
    if it were the only one.
    """

    size: int
    legal: int
    pruned: Mapping[str, int]
    alone: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Space:
    """A kernel's tunables and rules for one problem on one device."""

    params: tuple[Param, ...]
    rules: tuple[Rule, ...]
    apart: Apart | None = None
    _legal: list[Config] = field(default_factory=list, compare=False, repr=False)
    _census: list[Census] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        for kind, names in (
            ("parameter", [param.name for param in self.params]),
            ("rule", [rule.name for rule in self.rules]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise UsageError(f"the space has two {kind}s named `{twice.pop()}`")

    @classmethod
    def listed(cls, params: tuple[Param, ...], rule: Rule, legal: Sequence[Config]) -> "Space":
        """A space whose legal configs are known, in the order of the parameters' values; `rule` must hold for just these."""
        size = math.prod(len(param.values) for param in params)
        removed = {rule.name: size - len(legal)}
        census = Census(size=size, legal=len(legal), pruned=removed, alone=removed)
        return cls(params, (rule,), None, list(legal), [census])

    def limited(self, wanted: Callable[[str, Value], bool]) -> "Space":
        """The same rules over those values that are `wanted` of their parameter."""
        params = (
            replace(param, values=tuple(value for value in param.values if wanted(param.name, value)))
            for param in self.params
        )
        return replace(self, params=tuple(params), _legal=[], _census=[])

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(param.name for param in self.params)

    @property
    def interpreted(self) -> tuple[str, ...]:
        """Names of the parameters that Triton's interpreter sees."""
        return tuple(param.name for param in self.params if param.interpreted)

    @property
    def legal(self) -> Sequence[Config]:
        """Every legal config, in the order of the parameters' values."""
        self._enumerate()
        return self._legal

    @property
    def census(self) -> Census:
        self._enumerate()
        return self._census[0]

    def distinct(self, names: Sequence[str]) -> list[Config]:
        """For every combination of the parameters `names` that has legal configs, the first of these."""
        leading = [param for param in self.params if param.name in names]
        others = [param for param in self.params if param.name not in names]
        found = _Walk([*leading, *others], self.rules).legal(distinct=len(leading))
        return [Config({name: config[name] for name in self.names}) for config in found]

    def check(self, config: Mapping[str, Any]) -> Config:
        """Return `config` in the order of the space. Raises `UsageError` if it is not a legal member."""
        for name in config:
            if name not in self.names:
                raise UsageError(f"the space has no parameter `{name}`", hint=did_you_mean(name, self.names))
        for param in self.params:
            if param.name not in config:
                raise UsageError(f"the config `{dict(config)}` gives no `{param.name}`")
            if config[param.name] not in param.values:
                raise UsageError(f"`{param.name}` cannot be {config[param.name]}: allowed are {param.values}")
        found = Config({param.name: config[param.name] for param in self.params})
        broken = self.broken_rule(found)
        if broken:
            raise UsageError(f"the config `{found}` breaks the rule `{broken.name}`: {broken.why}")
        return found

    def broken_rule(self, config: Config) -> Rule | None:
        """The first rule that removes `config`, or None if it is legal."""
        return next((rule for rule in self.rules if not rule.holds(config)), None)

    @property
    def fingerprint(self) -> str:
        """Digest of parameters and legal configs (not of the reasons given)."""
        described = {
            "params": [[param.name, list(param.values)] for param in self.params],
            "legal": [list(config.values()) for config in self.legal],
        }
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def _enumerate(self) -> None:
        if not self._census:
            walk = _Walk(self.params, self.rules)
            self._legal.extend(walk.legal())
            alone = {rule.name: walk.removed_by(rule) for rule in self.rules}
            self._census.append(Census(size=walk.size, legal=len(self._legal), pruned=walk.pruned, alone=alone))


class _Unknown(Exception):  # noqa: N818  (no error: it says which parameter a rule waits for)
    """A rule asked for a parameter that has no value yet."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Partial(Config):
    """A config that grows: to read what is not known yet raises `_Unknown`, which no Mapping method takes for an absent key."""

    __slots__ = ("_known_names",)

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__({})
        self._known_names = frozenset(names)

    def __getitem__(self, name: str) -> Value:
        if name in self._values:
            return self._values[name]
        if name in self._known_names:
            raise _Unknown(name)
        raise KeyError(name)

    def put(self, name: str, value: Value) -> None:
        self._values[name] = value

    def drop(self, name: str) -> None:
        del self._values[name]


class _Walk:
    """All combinations of parameters as a tree, cut off where a rule already removes what lies below."""

    def __init__(self, params: Sequence[Param], rules: Sequence[Rule]) -> None:
        self._params = params
        self._rules = rules
        self._values = {param.name: param.values for param in params}
        self._depth = {param.name: depth for depth, param in enumerate(params)}
        self._below = [math.prod(len(param.values) for param in params[depth:]) for depth in range(len(params) + 1)]
        self._partial = _Partial(tuple(self._values))
        self.size = self._below[0]
        self.pruned = {rule.name: 0 for rule in rules}

    def legal(self, distinct: int | None = None) -> Iterator[Config]:
        """Every legal config in the order of the parameters' values; counts in `pruned` what is cut off on the way.

        Of those that agree in the first `distinct` parameters, only the first one.
        """
        return self._descend(-1, [(rule, -1) for rule in self._rules], distinct)

    def removed_by(self, rule: Rule) -> int:
        """How many combinations `rule` removes on its own: only parameters that it reads are gone through."""
        return self._removed(rule, self.size)

    def _descend(
        self, depth: int, waiting: list[tuple[Rule, int]], distinct: int | None = None
    ) -> Generator[Config, None, None]:
        """Configs below the node at which parameters up to `depth` are known; a rule waits for the parameter beside it."""
        still = []
        for rule, needed in waiting:
            if needed > depth:
                still.append((rule, needed))
                continue
            try:
                holds = rule.holds(self._partial)
            except _Unknown as unknown:
                still.append((rule, self._depth[unknown.name]))
                continue
            if not holds:
                self.pruned[rule.name] += self._below[depth + 1]
                return
        if depth + 1 == len(self._params):
            yield Config(self._partial._values)
            return
        param = self._params[depth + 1]
        try:
            for value in param.values:
                self._partial.put(param.name, value)
                below = self._descend(depth + 1, still, distinct)
                if depth + 2 == distinct:
                    with contextlib.closing(below):
                        yield from itertools.islice(below, 1)
                else:
                    yield from below
        finally:
            self._partial.drop(param.name)

    def _removed(self, rule: Rule, combinations: int) -> int:
        try:
            return 0 if rule.holds(self._partial) else combinations
        except _Unknown as unknown:
            name = unknown.name
        found = 0
        for value in self._values[name]:
            self._partial.put(name, value)
            found += self._removed(rule, combinations // len(self._values[name]))
        self._partial.drop(name)
        return found
