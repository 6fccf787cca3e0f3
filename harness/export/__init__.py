"""Exports: champions in the form that a consumer reads, one module for each. docs/exports.md.

`base.py` has the types, `gather.py` says which champions may leave and why others stay, `folder.py` writes a folder whole,
`TARGETS` below names the modules. Refuses a champion of another kernel family, whatever its number is.
"""

from collections.abc import Mapping

# Target names by module. A module has a `TARGET` (`harness.export.base.Target`); to add one is one line here.
TARGETS: Mapping[str, str] = {
    "aiter": "aiter",
    "fla": "fla",
    "flashinfer-bench": "flashinfer_bench",
    "flex-attention": "flex_attention",
    "hf-kernel": "hf_kernel",
    "inductor-choices": "inductor_choices",
    "t4": "t4",
    "triton": "triton",
}
