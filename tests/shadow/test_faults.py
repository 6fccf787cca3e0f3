"""The probes for known faults of the interpreter: all of them pass on one that is mended, so none is always right or wrong."""

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from harness import interpreter
from harness.errors import MachineError
from harness.interpreter import interpreter_faults
from harness.shadow import shadow

TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
}


def to_torch(handle: TensorHandle) -> torch.Tensor:
    values = torch.from_numpy(np.ascontiguousarray(handle.data).astype(handle.data.dtype, copy=True))
    return values.view(TORCH[handle.dtype]) if handle.dtype in (tl.bfloat16, tl.float8e5) else values


def from_torch(values: torch.Tensor, kind) -> TensorHandle:
    integers = {tl.bfloat16: torch.int16, tl.float8e5: torch.int8}
    stored = values.contiguous().view(integers[kind]).numpy() if kind in integers else values.numpy()
    return TensorHandle(stored.view(f"u{stored.itemsize}") if kind in integers else stored, kind)


class Mended(InterpreterBuilder):
    """The operations that are probed, made by torch or in wider numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.options = dataclasses.replace(self.options, debug=True)

    def converted(self, source, kind, *_):
        return from_torch(to_torch(source).to(TORCH[kind]), kind)

    create_si_to_fp = create_fp_trunc = create_fp_ext = create_fp_to_fp = converted

    def create_bitcast(self, source, kind):
        return source

    def create_fadd(self, one, two):
        return from_torch(to_torch(one) + to_torch(two), one.dtype)

    def create_fcmpOLT(self, one, two):  # noqa: N802
        return TensorHandle((to_torch(one) < to_torch(two)).numpy(), tl.int1)

    def create_dot(self, one, two, total, *_):
        return from_torch(to_torch(one).float() @ to_torch(two).float() + to_torch(total), tl.float32)

    def create_fma(self, one, two, three):
        return TensorHandle((one.data.astype(np.float64) * two.data + three.data).astype(np.float32), tl.float32)

    def create_maxnumf(self, one, two):
        return TensorHandle(np.fmax(one.data, two.data), one.dtype)

    def create_add(self, one, two):
        if one.dtype != tl.int1:
            return super().create_add(one, two)
        return TensorHandle(one.data ^ two.data, tl.int1)


def test_a_mended_interpreter_has_no_faults(monkeypatch):
    monkeypatch.setattr(interpreter, "_BUILDER", Mended())
    assert interpreter_faults() == ()


def test_the_faults_that_every_version_has():
    # Found in Triton 3.6.0 to 3.9.0; a version without them shows here that the kernels' detours can go.
    faults = interpreter_faults()
    assert {"bf16-dot", "bf16-arithmetic", "bf16-rounding", "device-assert", "overflow-checks"} <= set(faults)
    assert list(faults) == sorted(faults)
    assert interpreter_faults() == faults


def test_a_probe_that_raises_is_a_fault(monkeypatch):
    class Refusing(Mended):
        def create_fma(self, *_):
            raise NotImplementedError

    monkeypatch.setattr(interpreter, "_BUILDER", Refusing())
    assert interpreter_faults() == ("fma-rounds-twice",)


def test_compiled_kernels_cannot_be_watched():
    if triton.knobs.runtime.interpret:
        pytest.skip("this process interprets")
    with pytest.raises(MachineError, match="TRITON_INTERPRET=1"), shadow({}, {}):
        pass
