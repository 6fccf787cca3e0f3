"""Child of `test_operation.py`: what the operation does where Triton neither interprets nor finds a GPU."""

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.attention import attention


def main() -> None:
    q, k, v = (torch.zeros(1, heads, 4, 8, device="meta", dtype=torch.bfloat16) for heads in (2, 1, 1))
    assert attention(q, k, v).shape == (1, 2, 4, 8)
    with FakeTensorMode():
        fake = [torch.zeros(1, heads, 4, 8, device="cuda", dtype=torch.bfloat16) for heads in (2, 1, 1)]
        out, lse = attention(*fake, return_lse=True)
        assert out.device.type == lse.device.type == "cuda" and lse.dtype == torch.float32
    try:
        attention(*(torch.zeros(1, 1, 4, 8) for _ in range(3)))
    except ValueError as error:
        assert "TRITON_INTERPRET=1" in str(error), error
    else:
        raise AssertionError("tensors on the CPU were accepted")
    try:
        attention(q.double(), k.double(), v.double())
    except ValueError as error:
        assert "fp64 in the interpreter" in str(error), error
    else:
        raise AssertionError("fp64 was accepted")
    sys.stdout.write("done\n")


main()
