"""The fewest configs that serve many problems: each problem keeps one that is within 2 % of its own best.

Whoever ships a kernel ships few configs. Pure functions of ratios; exact where that takes a moment, else greedy, and it says
which. Refuses to guess: a config that was not tried on a problem does not serve it.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.space import Config

# How much slower than a problem's own best a config may be that serves it.
WITHIN = 0.02
# So many configs have a million subsets; beyond, the greedy choice is taken.
_EXACT = 20


@dataclass(frozen=True, slots=True)
class Member:
    """A config, and the problems that it serves, each with how many times longer it takes than the best there at most."""

    config: Config
    serves: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Portfolio:
    """Few configs for many problems. `exact` says that no fewer do; else they are at most `bound` times as many as needed.

    `unserved` are problems without a champion.
    """

    members: tuple[Member, ...]
    within: float
    exact: bool
    bound: float
    unserved: tuple[str, ...] = ()


def smallest_portfolio(ratios: Mapping[str, Mapping[Config, float]], *, within: float = WITHIN) -> Portfolio:
    """Choose configs so that every problem has one whose ratio to its best is at most 1 + `within`.

    `ratios` are, by problem, those of the configs that were tried there: times over the best time, or the upper ends of their
    intervals. Among equally few, those win that are fastest over all problems together. Without a single ratio a problem is left
    unserved.
    """
    served = {problem: {c: r for c, r in found.items() if r <= 1 + within} for problem, found in ratios.items()}
    unserved = tuple(problem for problem, found in served.items() if not found)
    served = {problem: found for problem, found in served.items() if found}
    problems = list(served)
    configs = list(dict.fromkeys(config for found in served.values() for config in found))
    masks = [sum(1 << place for place, problem in enumerate(problems) if c in served[problem]) for c in configs]
    kept = [place for place, mask in enumerate(masks) if not _dominated(place, masks, configs, served)]
    exact = len(kept) <= _EXACT
    whole = (1 << len(problems)) - 1
    chosen = _fewest(kept, masks, whole, configs, served) if exact else _greedy(kept, masks, whole)
    largest = max((mask.bit_count() for mask in masks), default=1)
    bound = 1.0 if exact else sum(1 / count for count in range(1, largest + 1))
    return Portfolio(
        members=_members([configs[place] for place in chosen], served),
        within=within, exact=exact, bound=bound, unserved=unserved,
    )  # fmt: skip


def _dominated(
    place: int, masks: Sequence[int], configs: Sequence[Config], served: Mapping[str, Mapping[Config, float]]
) -> bool:
    """Whether another config serves all that this one does, and is nowhere slower: then nobody needs this one."""
    mine = {problem: found[configs[place]] for problem, found in served.items() if configs[place] in found}
    for other, mask in enumerate(masks):
        if other == place or masks[place] & ~mask:
            continue
        theirs = [served[problem][configs[other]] for problem in mine]
        no_slower = all(one <= two for one, two in zip(theirs, mine.values(), strict=True))
        # Of two that are equal in everything the first stays.
        if no_slower and (mask != masks[place] or theirs != list(mine.values()) or other < place):
            return True
    return False


def _fewest(
    kept: Sequence[int],
    masks: Sequence[int],
    whole: int,
    configs: Sequence[Config],
    served: Mapping[str, Mapping[Config, float]],
) -> tuple[int, ...]:
    for size in range(len(kept) + 1):
        enough = [some for some in itertools.combinations(kept, size) if _union(masks, some) == whole]
        if enough:
            return min(enough, key=lambda some: _total([configs[place] for place in some], served))
    return ()


def _greedy(kept: Sequence[int], masks: Sequence[int], whole: int) -> tuple[int, ...]:
    """Again and again the config that serves most of what is left (Chvatal, 1979: within H(largest) of the fewest)."""
    chosen: list[int] = []
    left = whole
    while left:
        best = max(kept, key=lambda place: (masks[place] & left).bit_count())
        chosen.append(best)
        left &= ~masks[best]
    return tuple(chosen)


def _union(masks: Sequence[int], some: Sequence[int]) -> int:
    found = 0
    for place in some:
        found |= masks[place]
    return found


def _total(members: Sequence[Config], served: Mapping[str, Mapping[Config, float]]) -> float:
    """The sum over problems of the logarithms of the best ratio that some member has."""
    return sum(math.log(min(found[one] for one in members if one in found)) for found in served.values())


def _members(chosen: Sequence[Config], served: Mapping[str, Mapping[Config, float]]) -> tuple[Member, ...]:
    """Every problem goes to the member that is fastest on it."""
    serving: dict[Config, dict[str, float]] = {config: {} for config in chosen}
    for problem, found in served.items():
        best = min((config for config in chosen if config in found), key=lambda config: found[config])
        serving[best][problem] = found[best]
    members = [Member(config, problems) for config, problems in serving.items()]
    return tuple(sorted(members, key=lambda one: -len(one.serves)))
