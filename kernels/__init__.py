"""Attention kernels. Each file is self-contained: torch, triton and sibling files only, so copying the folder is enough.

`attention.py` is what a library calls: one differentiable function over `flash_fwd.py` and `flash_bwd.py`, registered as PyTorch
operators by `operators.py`; `functions.py` lets it take score and mask functions of the caller. `baselines.py` holds plain
attention in PyTorch, to read and to compare with; it needs no sibling. `paged.py` is how `flash_decode.py` finds keys and values
in pages, which `attention.attention_paged` takes. `sdpa.py` has PyTorch's backends, to compare with.
The rest of this is for who writes a kernel.

The contract of a kernel file `kernels/NAME.py`, tuned by `search_spaces/NAME.py`:

`PASS`        "fwd" or "bwd".
`HEADROOM`    optional: by types of 8 bits, the power of two up to which weights, at most 1 by themselves, are raised before they
              are rounded to it. Without it no such type is taken.
`PACKED`      optional: True where the query heads of a group are rows of one tile.
`launches`    function (tensors by name, *, problem keywords, tunables) -> list[Launch]. Its positional-or-keyword
              parameters are the tensors; its keyword-only parameters are `scale`, `window_left`, `window_right`,
              `top_left` and then the tunables, whose names are those of the search space. It launches nothing.
`workspaces`  function (tensors by name of the inputs, *, tunables) -> {name: (shape, torch dtype)} for scratch tensors
              that `launches` takes beside the inputs and outputs; need not be initialised by the caller. Its keyword-only
              parameters are those tunables, if any, on which the scratch depends.

`FAMILY`      optional: whose kernel it is, "flashtune" without it. Only who runs kernels of that family may use its configs.
`UNSEEN`      optional: what no run on a CPU shows. A file that has it launches nothing: its `launches` gives calls of functions
              that PyTorch compiles (`launch.Call`), as `flex_attention.py` and `flex_attention_bwd.py` do.

A tunable with `block_n` in its name is a number of keys, one with `block_m` of queries, one with `splits` the number of parts
into which the keys of a row are divided: judges choose their questions by them. `lag`, if there is one, is by how many powers of
two a row's maximum may rise before its sums are rescaled, which bounds take into account.

Forward tensors:  q, k, v -> out, lse.                 Backward tensors:  q, k, v, out, lse, dout -> dq, dk, dv.
With block_table and kv_lengths, k and v are pools (pages, heads, rows of a page, head_dim).
Shapes are (batch, heads, length, head_dim) with any strides; lse is (batch, heads, length), fp32, natural logarithm.
A row that sees no key has output 0, log-sum-exp -inf and zero gradients.
"""
