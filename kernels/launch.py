"""What a kernel file hands out: the launches that one call consists of, as values.

Because a launch is a value, the same description serves three uses: `run()` it, compile it for a machine that is not
here (tensors on the `meta` device are enough), and predict its time from the steps that each program makes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Inner-loop iterations of the programs of one launch, for prediction; it has no influence on a run.

    `plain[i]` and `masked[i]` count the iterations without and with masking of programs whose position along the first
    grid axis is i; every such program is repeated once per element of the other grid axes. `flops_per_step` counts the
    matrix operations of one iteration, on padded tiles (multiply and add count one each). `rows` is the number of rows of the
    tile that the operands of a step meet, where the problem's lengths and the number of programs do not tell; else 0.
    """

    plain: tuple[int, ...]
    masked: tuple[int, ...]
    flops_per_step: int
    rows: int = 0
    tiles: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel launch. `args` are run-time arguments and `constants` compile-time ones, both by parameter name;
    `options` are compiler options such as `num_warps`, `num_stages`, `maxnreg`. `scratch` says that the kernel makes tensor
    descriptors, for which Triton asks the host for memory on a GPU."""

    kernel: Any
    grid: tuple[int, int, int]
    args: Mapping[str, Any]
    constants: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: Steps | None = None
    scratch: bool = False

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def run(self) -> None:
        """Launch on the current device; a grid with an empty axis is no launch at all."""
        if 0 not in self.grid:
            if self.scratch:
                triton.set_allocator(_allocate)
            self.kernel[self.grid](**self.args, **self.constants, **self.options)


def _allocate(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory for the descriptors of one launch, on the current device; PyTorch aligns to more than Triton asks for."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of a function that PyTorch compiles, for a kernel file that launches nothing itself.

    `results` computes everything and gives it in the order of `outputs`, into which `run` copies it. `prepared` gives what is
    timed, from the same inputs: it leaves its results where its compiler likes, and does no work but that of the call.
    `subject` is what is compiled, for whoever compiles it where no device is.
    """

    outputs: tuple[torch.Tensor, ...]
    results: Callable[[], tuple[torch.Tensor, ...]]
    prepared: Callable[[], Callable[[], None]]
    subject: Any

    def run(self) -> None:
        """Compute, and leave the results in the outputs."""
        for output, result in zip(self.outputs, self.results(), strict=True):
            output.copy_(result)
