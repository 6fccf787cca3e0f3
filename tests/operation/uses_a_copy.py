"""Child of `test_operation.py`: attention of a copied folder, forward and backward; then of the original beside it.

Argument: the root of the original, which is not on the path at first.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch
from library.attention_kernels.attention import attention


def gradients(function, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out, lse = function(*leaves, causal=True, return_lse=True)
    return (out.detach(), lse.detach(), *torch.autograd.grad(out.sum() + lse.sum(), leaves))


def main(root: str) -> None:
    # Hugging Face's package of that name may be installed; ours must be out of reach.
    found = importlib.util.find_spec("kernels")
    assert found is None or not Path(str(found.origin)).resolve().is_relative_to(Path(root) / "kernels")
    here = Path.cwd().resolve()
    loaded = [module for name, module in sys.modules.items() if name.startswith("library")]
    assert len(loaded) > 5 and all(Path(str(module.__file__)).resolve().is_relative_to(here) for module in loaded)
    tensors = [torch.randn(1, heads, length, 8) for heads, length in ((2, 5), (1, 7), (1, 7))]
    answers = gradients(attention, tensors)
    assert all(torch.isfinite(tensor).all() for tensor in answers)

    sys.path.insert(0, root)
    original = importlib.import_module("kernels.attention")
    assert original.PLAIN.forward is not sys.modules["library.attention_kernels.attention"].PLAIN.forward
    names = dir(torch.ops.flashtune)
    assert {"attention_fwd", "attention_bwd", "library_attention_kernels_attention_fwd"} <= set(names), names
    for function in (attention, original.attention):
        assert all(map(torch.equal, gradients(function, tensors), answers))
    sys.stdout.write("done\n")


main(sys.argv[1])
