"""Planted bugs of the stock kernels beside those of `tests/gate/planted.py`, after section 6 of the fuzzing study.

`PRECISION` names the ones that compute the right thing too coarsely, which no exact property is asked to see.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _planted() -> ModuleType:
    path = Path(__file__).parents[1] / "gate" / "planted.py"
    spec = importlib.util.spec_from_file_location("gate_planted_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


PLANTED = _planted()
plant = PLANTED.plant
_FWD, _BWD, _PRIMITIVES = "flash_fwd.py", "flash_bwd.py", "primitives.py"
_STORED = "o = acc / tl.where(z > 0, z, 1.0)[:, None]"
_HIGH = "last = tl.minimum(last, tl.cdiv(tl.maximum(last_row + offset + right + 1, 0), BLOCK))"
_PLAIN = "plain_last = tl.minimum(plain_last, tl.maximum(first_row + offset + right + 1, 0) // BLOCK)"
_DQ_SEEN = "query[:, None], key[None, :], offset, left, right, kv_len, HAS_LEFT, HAS_RIGHT, EVEN)"
_DKDV_SEEN = "key[:, None], query[None, :], offset, left, right, q_len, HAS_LEFT, HAS_RIGHT, EVEN)"
_DO_LOAD = "do = load_tile(do_at, start_m, q_len, stride_dout_row,"

_TABLE = (
    ("causal one too far", _PRIMITIVES, "col <= row + (offset + right)", "col <= row + (offset + right) + 1", "fwd bwd"),
    ("maximum starts at 0", _FWD, 'm = tl.full([BLOCK_M], float("-inf"), dtype=ACC)', "m = tl.zeros([BLOCK_M], dtype=ACC)",
     "fwd"),
    ("1/l in fp16", _FWD, _STORED,
     "o = acc * (1.0 / tl.where(z > 0, z, 1.0)).to(tl.float16).to(tl.float32)[:, None]", "fwd"),
    ("no guard of rows that saw nothing", _FWD, 'shift = tl.where(m_next == float("-inf"), 0.0, m_next)', "shift = m_next",
     "fwd"),
    ("finite sentinel", _FWD, 's = tl.where(seen, s, float("-inf"))', "s = tl.where(seen, s, -1.0e4)", "fwd"),
    ("fp16 accumulator", _FWD, "acc = product(rounded(p, v.dtype), v, acc * shrink[:, None])",
     "acc = product(rounded(p, v.dtype), v, acc * shrink[:, None]).to(tl.float16).to(tl.float32)", "fwd"),
    ("v with strides of k", _FWD, "v = load_tile(v_at, start, kv_len, stride_v_row,",
     "v = load_tile(v_at, start, kv_len, stride_k_row,", "fwd"),
    ("always top-left", _PRIMITIVES, "offset = 0 if top_left else kv_len - q_len", "offset = 0", "fwd bwd"),
    ("maximum of the block only", _FWD, "m_next = tl.maximum(m, tl.max(s, 1) * factor)", "m_next = tl.max(s, 1) * factor",
     "fwd"),
    ("v tail not masked", _FWD, "V_HEAD_DIM, BLOCK_N, BLOCK_DV, CHECK, TMA)",
     "V_HEAD_DIM, BLOCK_N, BLOCK_DV, False, TMA)", "fwd"),
    ("last block missing", _PRIMITIVES, _HIGH, _HIGH.replace("tl.cdiv(", "(").replace(", 0), BLOCK))", ", 0)) // BLOCK)"),
     "fwd bwd"),
    ("window begins a block late", _PRIMITIVES, "tl.minimum(lowest // BLOCK, last)",
     "tl.minimum(tl.cdiv(lowest, BLOCK), last)", "fwd bwd"),
    ("l plus 1e-3", _FWD, _STORED, "o = acc / (tl.where(z > 0, z, 1.0)[:, None] + 1.0e-3)", "fwd"),
    ("scale squared in masked blocks", _FWD, "p = tl.exp2(s * factor - shift[:, None])",
     "p = tl.exp2(s * factor * (factor if MASKED else 1.0) - shift[:, None])", "fwd"),
    ("mask skipped without the offset", _PRIMITIVES, _PLAIN, _PLAIN.replace(" + offset", ""), "fwd bwd"),
    ("mask skipped one block too far", _PRIMITIVES, _PLAIN,
     "plain_last = tl.minimum(plain_last, tl.cdiv(tl.maximum(first_row + offset + right + 1, 0), BLOCK))", "fwd bwd"),
    ("window mask skipped one block too early", _PRIMITIVES,
     "plain_first = tl.cdiv(tl.maximum(last_row + offset - left, 0), BLOCK)",
     "plain_first = tl.maximum(last_row + offset - left, 0) // BLOCK", "fwd bwd"),
    ("scale of the padded head dim", _FWD, "factor = scale * primitives.LOG2_E",
     "factor = scale * primitives.LOG2_E * math.sqrt(head_dim / primitives.padded(head_dim))", "fwd"),
    ("natural exponential", _FWD, "p = tl.exp2(s * factor", "p = tl.exp(s * factor", "fwd"),
    ("lse without its maximum", _PRIMITIVES, "(m + tl.log2(tl.where(z > 0, z, 1.0)))", "(tl.log2(tl.where(z > 0, z, 1.0)))",
     "fwd"),
    ("head stride for batch", _FWD, "v_base = v + batch * stride_v_batch", "v_base = v + batch * stride_v_head", "fwd"),
    ("negative scale taken for positive", _FWD, '"RISING": primitives.is_rising(factor)', '"RISING": True', "fwd"),
    ("no mask in dkdv", _BWD, _DKDV_SEEN, _DKDV_SEEN + " | (query >= 0)[None, :]", "bwd"),
    ("no mask in dq", _BWD, _DQ_SEEN, _DQ_SEEN + " | (key >= 0)[None, :]", "bwd"),
    ("dk scaled twice", _BWD, "dk_sum = dk_sum * natural_scale", "dk_sum = dk_sum * natural_scale * natural_scale", "bwd"),
    ("delta of dout with dout", _BWD, "total = tl.sum(o.to(ACC) * do.to(ACC), 1)",
     "total = tl.sum(do.to(ACC) * do.to(ACC), 1)", "bwd"),
    ("dq tail not masked", _BWD, _DQ_SEEN, _DQ_SEEN.replace("EVEN)", "True)"), "bwd"),
    ("dq window one short", _BWD, _DQ_SEEN, _DQ_SEEN.replace(" left,", " left - 1,"), "bwd"),
    ("dkdv window one short", _BWD, _DKDV_SEEN, _DKDV_SEEN.replace(" right,", " right - 1,"), "bwd"),
    ("empty rows not guarded in the backward", _PRIMITIVES,
     'return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)', "return lse * _LOG2_E", "bwd"),
    ("dk stored with strides of dv", _BWD, "store_tile(dk_sum, dk_base, start_n, kv_len, stride_dk_row,",
     "store_tile(dk_sum, dk_base, start_n, kv_len, stride_dv_row,", "bwd"),
    ("dout read with strides of out", _BWD, _DO_LOAD, _DO_LOAD.replace("stride_dout_row", "stride_out_row"), "bwd"),
    ("lse read beyond the end", _BWD, 'lse = tl.load(lse_at, mask=query < q_len, other=float("inf"))',
     "lse = tl.load(lse_at)", "bwd"),
    ("offset not negated", _PRIMITIVES, "Band(self.columns, self.rows, -self.offset,",
     "Band(self.columns, self.rows, self.offset,", "bwd"),
    ("last key's dv unwritten", _BWD, "store_tile(dv_sum, dv_base, start_n, kv_len,",
     "store_tile(dv_sum, dv_base, start_n, kv_len - 1,", "bwd"),
    ("ds without p", _BWD, "ds = p * (dp - delta[:, None])", "ds = dp - delta[:, None]", "bwd"),
    ("delta added", _BWD, "ds = p * (dp - delta[None, :])", "ds = p * (dp + delta[None, :])", "bwd"),
    ("delta of the first head", _BWD, "delta_base = delta + batch * stride_delta_batch + head * stride_delta_head",
     "delta_base = delta + batch * stride_delta_batch", "bwd"),
    ("dv of ds", _BWD, "dv = product(rounded(p, do.dtype), do, dv)", "dv = product(rounded(p * p, do.dtype), do, dv)", "bwd"),
    ("dq not started at zero", _BWD, "dq_sum = tl.zeros([BLOCK_M, BLOCK_D], dtype=ACC)",
     "dq_sum = tl.full([BLOCK_M, BLOCK_D], 0.001, dtype=ACC)", "bwd"),
)  # fmt: skip

PRECISION = ("1/l in fp16", "fp16 accumulator")
MUTANTS = (
    *(mutant for mutant in PLANTED.MUTANTS if mutant.times),
    *(
        PLANTED.Mutant(name, file, anchor, planted, tuple(passes.split()), ())
        for name, file, anchor, planted, passes in _TABLE
    ),
)
