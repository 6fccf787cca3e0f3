"""Loops of machine code, found by control flow: blocks, dominators, back edges, natural loops.

Compilers move slow paths (spinning on a barrier) behind the end of a kernel and branch back from there; a backward
branch alone is therefore no loop. Refuses to know any instruction set.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: its class, its matrix operations, the labels it may branch to, and whether the next one may
    follow."""

    kind: str
    flops: int = 0
    targets: tuple[str, ...] = ()
    falls: bool = True


def innermost_loops(
    code: Sequence[Instruction], labels: Mapping[str, int], *, wanted: Callable[[Mapping[str, int]], bool]
) -> list[list[int]]:
    """Indices of the instructions of each loop whose counts by class are `wanted`, in code order of the loop heads.

    `labels` maps a label to the index of the instruction that follows it. A loop around another such loop is left out.
    """
    starts = _block_starts(code, labels)
    ends = [*starts[1:], len(code)]
    bodies = {}
    for head, blocks in _natural_loops(_successors(code, labels, starts)).items():
        body = [index for block in sorted(blocks) for index in range(starts[block], ends[block])]
        if wanted(Counter(code[index].kind for index in body)):
            bodies[head] = body
    members = {head: set(body) for head, body in bodies.items()}
    around = {head for head in bodies if any(members[other] < members[head] for other in bodies)}
    return [bodies[head] for head in sorted(bodies) if head not in around]


def _block_starts(code: Sequence[Instruction], labels: Mapping[str, int]) -> list[int]:
    after = {index + 1 for index, one in enumerate(code) if one.targets or not one.falls}
    return sorted(index for index in {0, *labels.values(), *after} if index < len(code))


def _successors(code: Sequence[Instruction], labels: Mapping[str, int], starts: Sequence[int]) -> list[list[int]]:
    block_at = {start: block for block, start in enumerate(starts)}
    found: list[list[int]] = []
    for block, start in enumerate(starts):
        end = starts[block + 1] if block + 1 < len(starts) else len(code)
        last = code[end - 1] if end > start else Instruction("other")
        following = [block_at[labels[name]] for name in last.targets if labels.get(name, len(code)) in block_at]
        if last.falls and block + 1 < len(starts):
            following.append(block + 1)
        found.append(following)
    return found


def _natural_loops(successors: Sequence[Sequence[int]]) -> dict[int, set[int]]:
    """Blocks of each loop by its head. A back edge goes to a block that dominates its source."""
    entry = len(successors)
    successors = [*successors, _entries(successors)]
    order = _reverse_postorder(successors, entry)
    parents: dict[int, list[int]] = {block: [] for block in order}
    for block in order:
        for following in successors[block]:
            parents[following].append(block)
    above = _immediate_dominators(order, parents)
    loops: dict[int, set[int]] = {}
    for block in order:
        for head in successors[block]:
            if _dominates(above, head, block):
                body = loops.setdefault(head, {head})
                waiting = [block]
                while waiting:
                    member = waiting.pop()
                    if member not in body:
                        body.add(member)
                        waiting += parents[member]
    return loops


def _entries(successors: Sequence[Sequence[int]]) -> list[int]:
    """The first block, and whatever code is reached by jumps through a register only (partitions of specialized
    warps)."""
    entries: list[int] = []
    reached: set[int] = set()
    for block in range(len(successors)):
        if block not in reached:
            entries.append(block)
            reached.update(_reverse_postorder(successors, block))
    return entries


def _reverse_postorder(successors: Sequence[Sequence[int]], entry: int) -> list[int]:
    seen: set[int] = set()
    finished: list[int] = []
    waiting = [(entry, False)]
    while waiting:
        block, done = waiting.pop()
        if done:
            finished.append(block)
        elif block not in seen:
            seen.add(block)
            waiting.append((block, True))
            waiting += [(following, False) for following in successors[block] if following not in seen]
    return finished[::-1]


def _immediate_dominators(order: Sequence[int], parents: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001), figure 3."""
    rank = {block: position for position, block in enumerate(order)}
    above = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            known = [parent for parent in parents[block] if parent in above]
            best = known[0]
            for parent in known[1:]:
                best = _meet(above, rank, best, parent)
            if above.get(block) != best:
                above[block] = best
                changed = True
    return above


def _meet(above: Mapping[int, int], rank: Mapping[int, int], one: int, other: int) -> int:
    while one != other:
        while rank[one] > rank[other]:
            one = above[one]
        while rank[other] > rank[one]:
            other = above[other]
    return one


def _dominates(above: Mapping[int, int], head: int, block: int) -> bool:
    while block != head and above[block] != block:
        block = above[block]
    return block == head
