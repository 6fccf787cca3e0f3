"""Anybody's attention function as a subject: loaded by name, called as it wants to be, watched while it runs.

What an implementation does beside its numbers (a wrong type, a changed input, the answer of an earlier call) is a fault
named in `harness.witness.FAULTS`. Refuses to judge numbers, and to catch a crash: that is for the process around it.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from dataclasses import field, replace
from typing import Any

import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from torch import Tensor

from harness import inputs, witness
from harness.adapters import SIGNATURES, Function, Signature, Support, read_support, signature_for
from harness.bounds import RoundingContract, library_contract
from harness.errors import HarnessError, RefusedError, SubjectError, UsageError, did_you_mean
from harness.inputs import Guarded
from harness.libraries import STOCK, Bug
from harness.operation import operation_for
from harness.problem import Problem
from harness.subject import Answer


@dataclass(frozen=True, slots=True, config=ConfigDict(extra="forbid"))
class Foreign:
    """An implementation by name: `target` is `package.module:function` or a stock adapter; `signature` one of
    `harness.adapters.SIGNATURES` (a stock adapter has its own); `supports` words of `harness.adapters.read_support`."""

    target: str
    signature: str = ""
    supports: tuple[str, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load(foreign: Foreign, *, device: str = "cpu") -> "ForeignSubject":
    """Import what `foreign` names. Raises `UsageError` that says what was asked, what was found and what to do."""
    support = read_support(foreign.supports)
    if foreign.target not in STOCK:
        function = _imported(foreign.target)
        return ForeignSubject(foreign.target, function, signature_for(foreign.signature), support, device)
    stock = STOCK[foreign.target]
    if foreign.signature and SIGNATURES.get(foreign.signature) is not stock.signature:
        raise UsageError(
            f"the stock adapter `{foreign.target}` has a signature of its own, found `{foreign.signature}`",
            hint="leave the signature out",
        )
    support = replace(support, abilities=support.abilities & read_support(stock.supports).abilities)
    return ForeignSubject(
        foreign.target, stock.load(), stock.signature, support, device, stock.cannot, stock.contract, stock.bugs
    )


def check(foreign: Foreign) -> None:
    """Raise the `UsageError` of a mistake that shows without importing anything."""
    read_support(foreign.supports)
    if foreign.target not in STOCK:
        _named(foreign.target)
        signature_for(foreign.signature)


def adapt(function: Function, signature: str, supports: Sequence[str] = (), *, device: str = "cpu") -> "ForeignSubject":
    """A function at hand as a subject, named by its module and name."""
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', type(function).__name__)}"
    return ForeignSubject(name, function, signature_for(signature), read_support(supports), device)


def _named(target: str) -> tuple[str, str]:
    module_name, colon, path = target.partition(":")
    if not (colon and module_name and path):
        raise UsageError(
            f"`{target}` names no function",
            hint=f"write package.module:function, or one of the stock adapters: {', '.join(STOCK)}",
        )
    return module_name, path


def _imported(target: str) -> Function:
    module_name, path = _named(target)
    found: Any = _module(module_name, target)
    for name in path.split("."):
        if not hasattr(found, name):
            known = [
                known for known in dir(found) if not known.startswith("_") and callable(getattr(found, known, None))
            ]
            raise UsageError(f"`{target}`: {module_name} has no `{name}`", hint=did_you_mean(name, known))
        found = getattr(found, name)
    if not callable(found):
        raise UsageError(
            f"`{target}` is no function but {type(found).__name__}", hint="name a function that takes q, k and v"
        )
    function: Function = found
    return function


def _module(name: str, target: str) -> Any:
    def told(raised: Exception) -> HarnessError:
        if isinstance(raised, ModuleNotFoundError) and raised.name and f"{name}.".startswith(f"{raised.name}."):
            return UsageError(
                f"`{target}`: there is no module `{raised.name}` on the path of this Python",
                hint=f"install it, or name its folder in PYTHONPATH; stock adapters: {', '.join(STOCK)}",
            )
        return UsageError(
            f"`{target}`: importing {name} raised {type(raised).__name__}: {raised}",
            hint=f"`python -c 'import {name}'` shows where",
        )

    with witness.Blaming(told):
        return importlib.import_module(name)


# ---------------------------------------------------------------------------------------------------------------------
# The subject
# ---------------------------------------------------------------------------------------------------------------------


@plain_dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Call:
    """What one call gave: everything that was `made`, as it was returned; of that the `outputs` that were asked for, with the
    axes of the problem; faults; and how many Triton kernels were launched in the forward pass."""

    made: Mapping[str, Any]
    outputs: Mapping[str, Tensor]
    faults: tuple[str, ...]
    launches: int


# Inputs whose memory is remembered, at most: a property asks about four tensors three times.
_KEPT = 24


def _unlimited(problem: Problem) -> str | None:
    return None


@plain_dataclass(slots=True, eq=False)
class ForeignSubject:
    """A function, called on guarded copies of its inputs.

    Tensors at one address are copied to one address, so a function that remembers pointers meets new values there. Every
    question is asked twice, the second time with v (or dout) negated in place, to find answers that were remembered.
    NotImplementedError is a refusal, unless somebody stated what is supported.
    """

    name: str
    function: Function
    signature: Signature
    support: Support
    device: str = "cpu"
    cannot: Callable[[Problem], str | None] = _unlimited
    rounding: Callable[[Problem], RoundingContract] | None = None
    bugs: tuple[Bug, ...] = ()
    _kept: dict[tuple[Any, ...], Guarded] = field(default_factory=dict, init=False, repr=False)

    def refuses(self, problem: Problem) -> str | None:
        """See `Subject`: what is not supported, what the signature cannot say, or a known bug."""
        reason = self.support.lacks(problem) or self.signature.cannot(problem) or self.cannot(problem)
        if reason is None and "known-bugs" not in self.support.claims:
            reason = next((f"known bug: {bug.what} ({bug.versions})" for bug in self.bugs if bug.has(problem)), None)
        return reason

    def contract(self, problem: Problem) -> RoundingContract:
        """See `Subject`; that of a library of which nothing is known but what it claims, unless the adapter knows more."""
        return self.rounding(problem) if self.rounding else library_contract(problem, self.support.claims)

    def nearest(self, problem: Problem) -> Problem:
        """A problem like `problem` that this may be asked, as far as the words of its support decide."""
        return self.support.nearest(problem)

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        """See `Subject.run`; out and lse that are given are not used, a backward pass goes through the function's own."""
        reason = self.refuses(problem)
        if reason is not None:
            raise RefusedError(f"{self.name} does not do `{problem}`: {reason}")
        names = [name for name in operation_for(problem).inputs if name not in ("out", "lse")]
        given = {name: self._lay(name, inputs[name]) for name in names}
        call = self._call(problem, given)
        faults = [*call.faults, *self._memory_faults(problem, call, given)]
        outputs = {name: witness.kept_copy(output) for name, output in call.outputs.items()}
        faults += self._unwritten(problem, given, outputs)
        faults += self._remembered(problem, given, call, outputs)
        return Answer(outputs=witness.comparable(problem, outputs), faults=tuple(dict.fromkeys(faults)))

    def _lay(self, name: str, values: Tensor) -> Guarded:
        """A guarded copy of `values`, where an earlier tensor at the same address was copied to."""
        rows = values.stride(-1) == 1 or values.shape[-1] < 2
        if {"strides"} | (set() if rows else {"transposed"}) <= self.support.abilities:
            tensor = inputs.place_as(name, values, device=self.device)
        else:
            tensor = inputs.place(name, values, inputs.placement_for(self.signature.given), device=self.device)
        view = tensor.view
        key = (
            name, values.data_ptr(), view.dtype, tuple(view.shape), view.stride(), view.storage_offset(),
            len(tensor.storage),
        )  # fmt: skip
        if key not in self._kept:
            self._kept[key] = tensor
            while len(self._kept) > _KEPT:
                del self._kept[next(iter(self._kept))]
            return tensor
        kept = self._kept[key]
        kept.storage.copy_(tensor.storage)
        return Guarded(name=name, view=kept.view, storage=kept.storage, pristine=tensor.pristine)

    # -----------------------------------------------------------------------------------------------------------------
    # One call
    # -----------------------------------------------------------------------------------------------------------------

    def _call(self, problem: Problem, given: Mapping[str, Guarded], *, poison: bool = True) -> _Call:
        backward = problem.pass_ == "bwd"
        wants_lse = "lse" in self.support.claims and not backward
        leaves = [given[name].view.detach().requires_grad_(backward) for name in ("q", "k", "v")]
        q, k, v = (witness.swapped(leaf, self.signature.given) for leaf in leaves)
        with self._asking(problem, poison) as launches:
            raw = self.signature.call(self.function, problem, q, k, v, wants_lse)
        made = self._parts(raw, wants_lse)
        faults = witness.form_faults(problem, made, self.signature.made, self.device)
        if wants_lse and "lse" not in made:
            faults.append("no log-sum-exp: only out was returned")
        outputs = {name: value for name, value in made.items() if type(value) is Tensor and not value.is_meta}
        if "out" in outputs:
            outputs["out"] = witness.swapped(outputs["out"], self.signature.made)
        if backward:
            outputs, missing = self._gradients(problem, outputs.get("out"), leaves, given["dout"].view)
            faults += missing
        return _Call(made={**made, **outputs}, outputs=outputs, faults=tuple(faults), launches=launches[0])

    def _parts(self, raw: Any, wants_lse: bool) -> dict[str, Any]:
        """out, and lse where there is one, as they were returned."""
        if not isinstance(raw, tuple | list) or not raw:
            return {"out": raw}
        if len(raw) > 1 and raw[1] is not None and (wants_lse or self.signature.pairs):
            return {"out": raw[0], "lse": raw[1]}
        return {"out": raw[0]}

    def _gradients(
        self, problem: Problem, out: Tensor | None, leaves: Sequence[Tensor], dout: Tensor
    ) -> tuple[dict[str, Tensor], list[str]]:
        if out is None or out.shape != dout.shape:
            return {}, []
        if not out.requires_grad:
            return {}, ["no gradient: out is detached from q, k and v"]
        with self._asking(problem, poison=True):
            found = torch.autograd.grad(out, tuple(leaves), dout.to(out.dtype), allow_unused=True)
        named = dict(zip(("dq", "dk", "dv"), found, strict=True))
        missing = [f"no gradient: out does not depend on {name[1:]}" for name, value in named.items() if value is None]
        return {name: value for name, value in named.items() if value is not None}, missing

    @contextlib.contextmanager
    def _asking(self, problem: Problem, poison: bool) -> Iterator[list[int]]:
        """Within it nothing but the function runs. Gives a list of one number, the launches of Triton kernels."""
        watch = witness.counted() if "triton" in self.support.claims else contextlib.nullcontext([0])
        memory = witness.poisoned() if poison else contextlib.nullcontext()
        with (
            witness.Blaming(lambda raised: self._told(raised, problem)),
            memory,
            torch.enable_grad(),
            watch as launches,
        ):
            yield launches

    def _told(self, raised: Exception, problem: Problem) -> HarnessError:
        # Compilers say what was wrong in the second line.
        said = " ".join(line.strip() for line in str(raised).strip().splitlines()[:2])
        text = f"{type(raised).__name__}: {said} in `{problem}`"
        if isinstance(raised, NotImplementedError) and not self.support.stated:
            return RefusedError(f"{self.name} does not do it: {text}")
        return SubjectError(text)

    # -----------------------------------------------------------------------------------------------------------------
    # Faults
    # -----------------------------------------------------------------------------------------------------------------

    def _memory_faults(self, problem: Problem, call: _Call, given: Mapping[str, Guarded]) -> list[str]:
        found = []
        for name, tensor in given.items():
            if not tensor.unchanged():
                stray = tensor.stray_write()
                beside = "" if stray is None else f", {stray:+d} elements from its start"
                found.append(f"mutated input: {name} was written to{beside}")
            # Gradients may be what autograd was given: dout itself.
            found += [
                f"aliased input: {made} lies in the memory of {name}"
                for made in ("out", "lse")
                if witness.overlap(call.made.get(made), tensor.storage)
            ]
        something = 0 not in (problem.batch, problem.q_len, problem.kv_len)
        if "triton" in self.support.claims and something and not call.launches:
            found.append("no Triton: no kernel was launched")
        return found

    def _unwritten(self, problem: Problem, given: Mapping[str, Guarded], outputs: Mapping[str, Tensor]) -> list[str]:
        """Which NaN go when Python's torch.empty gives zeros. A function that cannot run so is not asked further."""
        if any(bool(tensor.view.isnan().any()) for tensor in given.values()):
            return []
        blank = {name: output.isnan() for name, output in outputs.items() if bool(output.isnan().any())}
        found: list[str] = []
        if blank:
            with contextlib.suppress(HarnessError), witness.ZeroEmpty():  # type: ignore[no-untyped-call]
                again = self._call(problem, given, poison=False).outputs
                gone = {name: int((nan & ~again[name].cpu().isnan()).sum()) for name, nan in blank.items()}
                found = [
                    f"uninitialized memory: {count} of {outputs[name].numel()} elements of {name} are what torch.empty held"
                    for name, count in gone.items()
                    if count
                ]
        return found

    def _remembered(
        self, problem: Problem, given: Mapping[str, Guarded], first: _Call, outputs: Mapping[str, Tensor]
    ) -> list[str]:
        """Ask again at the same addresses with v, or dout, negated: earlier outputs must stay, new ones change their sign."""
        view = given["dout" if problem.pass_ == "bwd" else "v"].view
        inputs.reachable(view, view).neg_()
        second = self._call(problem, given)
        found = [
            f"stale memory: {name} changed when the function was called again"
            for name, output in first.outputs.items()
            if not witness.same_bits(witness.kept_copy(output), outputs[name])
        ]
        found += [
            f"stale memory: {name} lies where {earlier} of the call before still does"
            for name, value in second.made.items()
            for earlier, old in first.made.items()
            if witness.overlap(value, old)
        ]
        signed = [name for name in outputs if name != "lse" and name in second.outputs]
        telling = any(bool((outputs[name].nan_to_num() != 0).any()) for name in signed)
        if telling and all(
            witness.same_bits(witness.kept_copy(second.outputs[name]), outputs[name]) for name in signed
        ):
            found.append(f"cached answer: {', '.join(signed)} did not change with the sign of an input")
        return found
