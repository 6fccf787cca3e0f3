"""The truth about compiled kernels: a fixed set of nasty questions, and how a candidate is asked one of them.

The same function asks compiled code on a device and interpreted code on a CPU, on the same inputs, in processes of their own;
both are judged by derived bounds, and their difference by the sum of both. Refuses to choose tolerances and to time anything.
"""

import base64
import functools
import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness import bounds, compare
from harness.bounds import Expectation, RoundingContract
from harness.cases import CASES, Case, kernel_subject, structured, tensors_of
from harness.compare import OutputCheck
from harness.errors import RefusedError
from harness.problem import Pass
from harness.space import Config, Space
from harness.subject import Kernel

# Runs of a candidate on a device, whose outputs must be equal bit for bit.
RUNS = 10

# Lengths lie at and around the sides of tiles; every mask, dtype, head dim from 16 to 256, group and layout occurs, forward and
# backward. Behind a bar stands the recipe of the values.
_PLAIN = (
    "b1 h2 s128 d64 bf16", "b1 h4/2 s129 d64 fp16 causal", "b2 h3/1 q127 k65 d64 bf16 causal", "b1 h2 q1 k257 d128 bf16 causal",
    "b1 h4/1 q257 k130 d32 fp16 causal top-left", "b1 h2/1 q64 k200 d128 bf16 causal top-left", "b1 h1 s1 d16 fp16",
    "b1 h2 q17 k16 d16 fp32", "b1 h2/1 s65 d64 fp32 causal", "b1 h2 s100 d128 fp32 causal window=31",
    "b1 h4/2 s192 d256 bf16 causal", "b1 h2 q130 k97 d256 fp16", "b1 h2 s96 d192/128 bf16 causal", "b1 h2 s130 d80 fp16 causal",
    "b1 h3 q33 k66 d40 bf16", "b1 h2 s160 d96 bf16 causal window=40", "b1 h4/2 s257 d64 bf16 causal window=64",
    "b1 h2 q150 k250 d64 fp16 window=33:17", "b2 h2/1 q129 k64 d128 bf16 window=0:0", "b1 h8/1 s70 d64 bf16 causal bshd",
    "b1 h2 q200 k131 d64 bf16 causal window=7 top-left", "b2 h2 s66 d32 fp16 causal sbhd", "b1 h2 s128 d64 bf16 scale=-0.25",
    "b1 h2 s64 d64 fp16 scale=0.0",
    "b1 h2 s256 d128 fp16 causal | large", "b1 h2/1 s200 d64 bf16 | outliers", "b1 h2 s129 d64 fp16 | constant_rows",
    "b1 h2 q90 k140 d64 bf16 causal | integers", "b1 h2 q145 k133 d64 bf16 causal | counting",
    "b1 h1 q512 k4096 d64 fp16 causal window=1000",
)  # fmt: skip
_VARIANTS = (
    "b1 h4/2 s130 d64 bf16 causal softcap=20.0", "b1 h2 q65 k129 d128 fp16 softcap=1.0", "b2 h4/2 s129 d64 bf16 causal alibi",
    "b1 h2 q97 k64 d32 fp16 alibi", "b1 h2 s129 d64 bf16 bias=bhqk", "b2 h2/1 q65 k130 d64 fp16 causal bias=hqk",
    "b1 h2 s64 d128 fp32 bias=bk", "b1 h4/2 s100 d64 bf16 causal sinks", "b1 h2 q66 k33 d64 fp16 sinks window=10:5",
    "b1 h2 s129 d64 bf16 causal dropout=0.1", "b1 h2/1 q70 k131 d32 fp16 dropout=0.5", "b2 h2 s130 d64 bf16 causal prefix",
    "b1 h2 s200 d64 bf16 causal chunk=64", "b1 h2 q65 k150 d128 fp16 chunk=33", "b2 h4/2 s150 d64 bf16 causal documents",
    "b1 h2 q129 k65 d64 fp16 documents", "b2 h2 s129 d64 bf16 mask=bk", "b1 h2/1 q65 k130 d64 fp16 mask=hqk",
    "b1 h4/2 s257 d64 bf16 causal packed=4", "b1 h2 q130 k200 d128 fp16 packed=3", "b1 h2 s96 d64 bf16 causal packed=2 window=20",
    "b1 h2 s100 d64 bf16 causal softcap=20.0 alibi sinks dropout=0.1",
)  # fmt: skip
# Long keys; gradients of all of them would make recorded answers too large to carry.
_FORWARD_ONLY = ("b1 h2/1 s2048 d128 bf16 causal", "b2 h8/2 q1 k3000 d128 bf16", "b1 h4/1 q3 k1000 d64 fp16 causal")
_BACKWARD_ONLY = ("b1 h4/2 s129 d64 bf16 causal lse-grad", "b1 h2 q65 k97 d128 fp16 lse-grad sinks")


def questions(pass_: Pass) -> tuple[tuple[str, str], ...]:
    """The problems of a pass in notation, each with the recipe of its values."""
    backward = pass_ == "bwd"
    texts = (*_PLAIN, *_VARIANTS, *(_BACKWARD_ONLY if backward else _FORWARD_ONLY))
    split = [text.partition(" | ") for text in texts]
    return tuple(
        (f"{problem} {pass_}", recipe or "normal")
        for problem, _, recipe in split
        # What these values prove of a forward pass follows from its output alone.
        if not (backward and recipe == "counting")
    )


def chosen_configs(space: Space, default: Config, count: int, seed: int) -> list[Config]:
    """The default and `count` legal configs that are far from it and from one another, by the positions of their values."""
    rng = np.random.default_rng(seed)
    some = [space.legal[place] for place in rng.permutation(len(space.legal))[:_SHORTLIST]]
    chosen = [default]
    while some and len(chosen) <= count:
        farthest = max(some, key=lambda config: min(_distance(space, config, other) for other in chosen))
        if farthest in chosen:
            break
        chosen.append(farthest)
    return chosen


_SHORTLIST = 64


def _distance(space: Space, one: Config, other: Config) -> float:
    return sum(
        abs(param.values.index(one[param.name]) - param.values.index(other[param.name])) / max(len(param.values) - 1, 1)
        for param in space.params
    )


# ---------------------------------------------------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------------------------------------------------

Packed = Mapping[str, tuple[str, tuple[int, ...], bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The outputs of a case, and the digest of the inputs that they belong to."""

    given: str
    outputs: Packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What one candidate answered. `checks` judge it by its bounds, `against` its difference to the interpreter's answer by the
    sum of both bounds, unless `incomparable` says why not; `faults` are in words, `differing` says what changed between the
    `runs`."""

    checks: tuple[OutputCheck, ...]
    faults: tuple[str, ...]
    runs: int
    differing: str
    answer: Answer
    against: tuple[OutputCheck, ...] = ()
    incomparable: str = ""

    @property
    def wrong(self) -> str:
        """What is wrong with it, in words; empty for what is right. Nothing compared is nothing right."""
        failed = [check for check in (*self.checks, *self.against) if not check.ratio <= 1]
        reasons = [compare.sentence(compare.worst(failed))] if failed else []
        reasons += [*self.faults[:3], *([self.differing] if self.differing else [])]
        return "; ".join(reasons) or ("" if self.checks else "nothing could be compared")

    @property
    def worst(self) -> float | None:
        """The largest error over its bound."""
        return max((check.ratio for check in self.checks), default=None)


def ask(kernel: Kernel, case: Case, device: str, runs: int, other: Answer | None = None) -> Reply:
    """Run `case` so often, and judge. `other` is what the interpreter gave for it; it counts if its inputs were the same.

    Raises `RefusedError` where the kernel cannot do it, `SubjectError` with what it raises.
    """
    subject = kernel_subject(kernel, case, device=device)
    refusal = subject.refuses(case.asked)
    if refusal is not None:
        raise RefusedError(f"the kernel does not do `{case.problem}`: {refusal}")
    values = _values(case)
    expected = _expected(case, subject.contract(case.asked))
    first = subject.run(case.asked, values)
    differing = ""
    for _ in range(runs - 1):
        again = subject.run(case.asked, values)
        differing = differing or _differing(first.outputs, again.outputs)
    answer = Answer(given=digest_of(values), outputs=pack(first.outputs))
    comparable = other is not None and other.given == answer.given
    return Reply(
        checks=compare.judge(first.outputs, expected, case=case.problem),
        faults=first.faults,
        runs=runs,
        differing=differing,
        answer=answer,
        against=_against(kernel, case, first.outputs, expected, unpack(other.outputs)) if other and comparable else (),
        incomparable="its inputs were others" if other and not comparable else "",
    )


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode() + b"\0" + _bytes(tensor))
    return digest.hexdigest()[:16]


def _against(
    kernel: Kernel, case: Case, found: Mapping[str, Tensor], expected: Expectation, other: Mapping[str, Tensor]
) -> tuple[OutputCheck, ...]:
    """`found` judged by what the interpreter gave, within the sum of both bounds, as if that were the truth."""
    theirs = _expected(case, kernel_subject(kernel, case, device="cpu").contract(case.asked))
    names = [name for name in expected.truth if name in other]
    both = Expectation(
        truth={name: other[name].double() for name in names},
        bounds={name: expected.bounds[name] + theirs.bounds[name] for name in names},
        largest=expected.largest,
    )
    return compare.judge({name: found[name] for name in names}, both, case=case.problem)


def _key(case: Case) -> str:
    """What the inputs of a case depend on, which its config is not."""
    return CASES.dump_json(replace(case, config={})).decode()


def _values(case: Case) -> dict[str, Tensor]:
    return _drawn(_key(case))


def _expected(case: Case, contract: RoundingContract) -> Expectation:
    return _known(_key(case), contract)


@functools.lru_cache(maxsize=4)
def _drawn(key: str) -> dict[str, Tensor]:
    return tensors_of(CASES.validate_json(key))


@functools.lru_cache(maxsize=8)
def _known(key: str, contract: RoundingContract) -> Expectation:
    case = CASES.validate_json(key)
    expect = bounds.expect_forward if case.asked.pass_ == "fwd" else bounds.expect_backward
    return expect(case.asked, _drawn(key), contract, structured=structured(case))


def _differing(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> str:
    for name, output in first.items():
        count = int((_integers(output) != _integers(second[name])).sum()) if output.numel() else 0
        if count:
            return f"{count} of {output.numel()} elements of {name} differ between two runs"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Bits
# ---------------------------------------------------------------------------------------------------------------------

_INTEGERS: Mapping[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _integers(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(_INTEGERS[tensor.element_size()])


def _bytes(tensor: Tensor) -> bytes:
    return bytes(_integers(tensor.cpu()).numpy().tobytes()) if tensor.numel() else b""


def pack(tensors: Mapping[str, Tensor]) -> Packed:
    """Tensors as bytes, with dtype and shape."""
    return {
        name: (str(one.dtype).removeprefix("torch."), tuple(one.shape), _bytes(one)) for name, one in tensors.items()
    }


def unpack(packed: Packed) -> dict[str, Tensor]:
    """The tensors again, contiguous, on the CPU."""
    found = {}
    for name, (dtype, shape, content) in packed.items():
        kind: torch.dtype = getattr(torch, dtype)
        flat = torch.frombuffer(bytearray(content), dtype=kind) if content else torch.empty(0, dtype=kind)
        found[name] = flat.reshape(shape)
    return found


def to_json(packed: Packed) -> dict[str, Sequence[Any]]:
    """Packed tensors as JSON values."""
    return {
        name: [dtype, list(shape), base64.b64encode(zlib.compress(content)).decode()]
        for name, (dtype, shape, content) in packed.items()
    }


def from_json(values: Mapping[str, Sequence[Any]]) -> Packed:
    """The inverse of `to_json`."""
    return {
        name: (dtype, tuple(shape), zlib.decompress(base64.b64decode(content)))
        for name, (dtype, shape, content) in values.items()
    }


def device_name(kernel: Kernel) -> str:
    """The product name of the device, after a small computation on it."""
    del kernel
    torch.ones(8, device="cuda").sum().item()
    return torch.cuda.get_device_name()
