"""What PyTorch's Inductor makes of FlexAttention for a GPU that is not here: the Triton templates, with all their options.

PyTorch's own lowering runs, for tensors that are said to lie on a GPU: nothing is launched, nothing is allocated there, and no
driver is asked. So what a template is given, and the source that it becomes, are the consumer's and no guess. This reaches into
private parts of PyTorch: it is written for `KNOWN` releases, and says so elsewhere. Refuses to time anything.
"""

import contextlib
import importlib
import math
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from harness.device import DeviceFacts
from harness.errors import MachineError, RefusedError

# Releases whose lowering is known to be as it is used here.
KNOWN = ("2.11", "2.12", "2.13")

_MASK_PARTS = (
    "kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices",
    "q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices",
)  # fmt: skip
# A block that holds everything, as FlexAttention has it where nothing is masked.
_WHOLE = 1 << 30
_TRITON_TYPES = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32, "i64": torch.int64,
    "i1": torch.bool, "u8": torch.uint8, "i8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """As `kernels.launch.Steps`: what each program does in the first and in the second loop of its code."""

    plain: tuple[int, ...]
    masked: tuple[int, ...]
    flops_per_step: int
    rows: int = 0
    tiles: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A Triton template as it was lowered: by `name`, with everything in `given` (options of the compiler among it), as `source`;
    `kernel` is the Triton function in it. Compiles like a launch of a kernel file, and cannot be run."""

    name: str
    given: Mapping[str, Any]
    source: str
    kernel: Any
    grid: tuple[int, int, int]
    args: Mapping[str, Tensor]
    steps: Steps
    constants: Mapping[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> Mapping[str, int]:
        return {name: self.given[name] for name in ("num_warps", "num_stages")}


def complaint(version: str = torch.__version__) -> str:
    """Why nothing can be lowered with this release of PyTorch; empty if it can."""
    if ".".join(version.split(".")[:2]) in KNOWN:
        return ""
    return f"PyTorch {version} lowers FlexAttention in its own way: known are {', '.join(KNOWN)}"


def lowered(subject: Any, device: DeviceFacts, *, choices: Any = None) -> list[Template]:
    """The templates of a `Call`'s subject on `device`, in the order in which they run.

    A backward pass has that of its forward pass first, which is no part of its time. `choices` is an InductorChoices that stands
    in for PyTorch's own. Raises `RefusedError` with what PyTorch says when it refuses the options, and `MachineError` where this
    release of PyTorch is not known.
    """
    unknown = complaint()
    if unknown:
        raise MachineError(
            unknown, hint="measure on a device, which needs no lowering here; or install a known release"
        )
    attention, tensors = subject
    with _pretended(device):
        graph, inputs, mode = _traced(attention, tensors)
        recorded = _recorded(graph, inputs, mode, choices)
    if not recorded:
        raise RefusedError(
            "PyTorch has no template left: the tiles of its own default do not divide the blocks of the mask"
        )
    return [_template(name, given, caller, attention, tensors) for name, given, caller in recorded]


def launches(subject: Any, device: DeviceFacts) -> list[Template]:
    """Those of the templates that are timed: the forward one, or the backward one."""
    found = lowered(subject, device)
    return found[-1:]


# ---------------------------------------------------------------------------------------------------------------------
# Pretending
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _pretended(device: DeviceFacts) -> Iterator[None]:
    """Within it Inductor believes that `device` is here, and no driver is asked."""
    hints = importlib.import_module("torch._inductor.runtime.hints")
    major, minor = divmod(device.compute_capability, 10)
    facts = {
        "type": "cuda", "index": 0, "multi_processor_count": device.multiprocessors, "cc": device.compute_capability,
        "major": major, "regs_per_multiprocessor": device.registers_per_sm, "warp_size": device.warp_size,
        "max_threads_per_multi_processor": device.warps_per_sm * device.warp_size, "max_threads_per_block": 1024,
    }  # fmt: skip
    properties = hints.DeviceProperties(
        **{name: value for name, value in facts.items() if name in hints.DeviceProperties._fields}
    )
    told = types.SimpleNamespace(
        major=major, minor=minor, multi_processor_count=device.multiprocessors, name=device.name, gcnArchName=device.arch,
        warp_size=device.warp_size, shared_memory_per_block_optin=device.shared_bytes_per_block,
    )  # fmt: skip
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    with contextlib.ExitStack() as stack:
        for owner, name, stand_in in (
            (hints.DeviceProperties, "create", staticmethod(lambda _: properties)),
            (torch.cuda, "get_device_capability", lambda *_: (major, minor)),
            (torch.cuda, "get_device_properties", lambda *_: told),
            (torch.cuda, "is_available", lambda: False),
            (fake, "init_gpu_context", lambda _: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield


def _traced(attention: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, list[Tensor], Any]:
    """The graph of a call, its inputs as tensors on a pretended GPU, and the mode in which they are pretended.

    The graph is traced of tensors that are said to lie on the CPU, since nothing computes shapes for a device that PyTorch has no
    code for; only the inputs decide which kernels it becomes.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.nn.attention import flex_attention as flex

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    names = [name for name in tensors if name not in ("out", "lse")]
    parts = _mask_shapes(attention, tensors)

    def pretended(device: str) -> list[Tensor]:
        with mode:
            given = [
                torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)
                for one in (tensors[name] for name in names)
            ]
            made = [torch.empty(shape, dtype=torch.int32, device=device) for shape in parts.values()]
        leaves = {"q", "k", "v"} if attention.backward and device == "cpu" else set()
        return [one.requires_grad_(name in leaves) for name, one in zip(names, given, strict=True)] + made

    inputs = pretended("cuda")
    options = _with_internals(flex, inputs, dict(attention.options))

    def call(*given: Tensor) -> Any:
        by_name = dict(zip(names, given, strict=False))
        blocks: dict[str, Any] = dict.fromkeys(_MASK_PARTS) | dict(zip(parts, given[len(names) :], strict=True))
        side = attention.sparse or _WHOLE
        visible = attention.mask_mod(by_name, attention.band) or flex.noop_mask
        lengths = (by_name["q"].shape[2], by_name["k"].shape[2])
        mask: Any = flex.BlockMask(lengths, **blocks, BLOCK_SIZE=(side, side), mask_mod=visible)
        changed = attention.score_mod(by_name, attention.band) or flex._identity
        operator: Any = torch.ops.higher_order.flex_attention
        out, lse, _ = operator(
            by_name["q"], by_name["k"], by_name["v"], changed, mask.as_tuple(), attention.scale, options
        )
        if not attention.backward:
            return out, lse
        return torch.autograd.grad(out, [by_name[name] for name in ("q", "k", "v")], by_name["dout"])

    with mode:
        graph = make_fx(call, decomposition_table=select_decomp_table())(*pretended("cpu"))
    return graph, inputs, mode


def _with_internals(flex: Any, inputs: Sequence[Tensor], options: dict[str, Any]) -> dict[str, Any]:
    """The options as FlexAttention hands them to its lowering. Raises `RefusedError` with what it says against them."""
    try:
        found: dict[str, Any] = flex._apply_kernel_options(*inputs[:3], False, options, flex.AuxRequest(lse=True))
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as refusal:
        raise RefusedError(f"PyTorch refuses the options: {refusal}") from refusal
    return found


def _mask_shapes(attention: Any, tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The tensors of the BlockMask, by name, with their shapes."""
    if not attention.masked:
        return {
            "kv_num_blocks": (1, 1, 1), "kv_indices": (1, 1, 1, 1), "q_num_blocks": (1, 1, 1), "q_indices": (1, 1, 1, 1),
        }  # fmt: skip
    batches, heads = (count or 1 for count in attention.mask_sizes(tensors))
    rows, columns = (-(-tensors[name].shape[2] // attention.sparse) for name in ("q", "k"))
    found: dict[str, tuple[int, ...]] = {}
    for kind, one, other in (("kv", rows, columns), ("q", columns, rows)):
        for full in ("", "full_"):
            found[f"{full}{kind}_num_blocks"] = (batches, heads, one)
            found[f"{full}{kind}_indices"] = (batches, heads, one, other)
    return {name: found[name] for name in _MASK_PARTS}


def _recorded(
    graph: Any, inputs: Sequence[Tensor], mode: Any, choices: Any
) -> list[tuple[str, Mapping[str, Any], Any]]:
    """Run the lowering; of each template that became code its name, what it was given, and the code."""
    from torch._inductor.graph import GraphLowering
    from torch._inductor.select_algorithm import TritonTemplate
    from torch._inductor.virtualized import V

    found: list[tuple[str, Mapping[str, Any], Any]] = []
    append: Callable[..., Any] = TritonTemplate.maybe_append_choice

    def recording(self: Any, choices: list[Any], **given: Any) -> Any:
        before = len(choices)
        error = append(self, choices, **given)
        if error is not None:
            raise RefusedError(f"PyTorch cannot make code of the template: {error}")
        found.extend((self.name, given, made) for made in choices[before:])
        return error

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(TritonTemplate, "maybe_append_choice", recording))
        stack.enter_context(mode)
        stack.enter_context(V.set_fake_mode(mode))
        if choices is not None:
            stack.enter_context(V.set_choices_handler(choices))
        lowering: Any = GraphLowering(graph, inputs)
        stack.enter_context(V.set_graph_handler(lowering))
        try:
            lowering.run(*inputs)
        except Exception as raised:
            _refuse(raised)
            raise
    return found


def _refuse(raised: Exception) -> None:
    """Raise `RefusedError` for what FlexAttention says of options, which Inductor wraps."""
    inner = getattr(raised, "inner_exception", None) or raised.__cause__ or raised
    names = {type(inner).__name__, type(raised).__name__}
    if isinstance(inner, RefusedError):
        raise inner from raised
    if "NoValidChoicesError" in (*names, str(inner).split(":")[0]):
        raise RefusedError(
            "PyTorch has no template left: the tiles of its own default do not divide the blocks of the mask"
        ) from raised
    if isinstance(inner, ValueError | NotImplementedError) or "LoweringException" in names:
        said = str(inner).strip().splitlines()
        raise RefusedError(f"PyTorch refuses it: {said[0] if said else type(inner).__name__}") from raised


# ---------------------------------------------------------------------------------------------------------------------
# Templates
# ---------------------------------------------------------------------------------------------------------------------


def _template(
    name: str, given: Mapping[str, Any], caller: Any, attention: Any, tensors: Mapping[str, Tensor]
) -> Template:
    from torch._inductor.codecache import PyCodeCache

    request = caller.bmreq
    module: Any = PyCodeCache.load_by_key_path(request.module_cache_key, request.module_path)
    tuner = getattr(module, request.kernel_name)
    plain = {key: _plain(value) for key, value in given.items() if _plain(value) is not None}
    source = Path(request.module_path).read_text(encoding="utf-8")
    return Template(
        name=name, given=plain, source=source, kernel=tuner.fn, grid=_grid(name, plain, tensors),
        args={one: _argument(kind) for one, kind in tuner.triton_meta["signature"].items()},
        steps=_steps(plain, attention, tensors, backward=name.endswith("backward")),
    )  # fmt: skip


def _plain(value: Any) -> bool | int | float | str | None:
    """Of what a template is given, what is a number or a word."""
    if isinstance(value, bool | int | float | str):
        return value
    return int(value) if getattr(value, "is_Integer", False) else None


def _argument(kind: str) -> Tensor:
    return torch.empty(1, dtype=_TRITON_TYPES[kind.lstrip("*")], device="meta")


def _grid(name: str, given: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, int, int]:
    q, k = tensors["q"], tensors["k"]
    if not name.endswith("backward"):
        return math.ceil(q.shape[2] / given["BLOCK_M"]), q.shape[0], q.shape[1]
    group = q.shape[1] // k.shape[1]
    programs = math.ceil(q.shape[2] / given["BLOCK_M2"]) * group + math.ceil(k.shape[2] / given["BLOCK_N1"])
    return programs, q.shape[0], k.shape[1]


def _steps(given: Mapping[str, Any], attention: Any, tensors: Mapping[str, Tensor], *, backward: bool) -> Steps:
    """What the programs do, in blocks of the band; other masks are taken for hiding nothing more.

    The code goes through partly visible blocks in its first loop and through whole ones in its second. Of a backward pass, steps
    of dq are counted as the part of a step of dk and dv that they cost.
    """
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    rows, keys, dim, dim_v = q.shape[2], k.shape[2], q.shape[3], v.shape[3]
    if not backward:
        m, n = given["BLOCK_M"], given["BLOCK_N"]
        partly, wholly = _counts(attention, (rows, keys), (m, n), by_query=True)
        return Steps(plain=tuple(partly), masked=tuple(wholly), flops_per_step=2 * m * n * (dim + dim_v))
    group = q.shape[1] // k.shape[1]
    m1, n1, m2, n2 = (given[f"BLOCK_{side}"] for side in ("M1", "N1", "M2", "N2"))
    partly, wholly = _counts(attention, (rows, keys), (m1, n1), by_query=False)
    queries_partly, queries_wholly = _counts(attention, (rows, keys), (m2, n2), by_query=True)
    each = 2 * m1 * n1 * (2 * dim + 2 * dim_v)
    share = 2 * m2 * n2 * (2 * dim + dim_v) / each

    def all_of(of_keys: list[int], of_queries: list[int]) -> tuple[int, ...]:
        return (*(group * count for count in of_keys), *(round(share * count) for count in of_queries * group))

    return Steps(plain=all_of(partly, queries_partly), masked=all_of(wholly, queries_wholly), flops_per_step=each)


def _counts(
    attention: Any, lengths: tuple[int, int], tile: tuple[int, int], *, by_query: bool
) -> tuple[list[int], list[int]]:
    """For each tile of queries (or of keys) the tiles of the other side that are partly, and wholly, visible."""
    rows, keys = lengths
    side_m, side_n = attention.sparse or tile[0], attention.sparse or tile[1]
    sparse_m, sparse_n = math.ceil(rows / side_m), math.ceil(keys / side_n)
    per_m, per_n = max(side_m // tile[0], 1), max(side_n // tile[1], 1)
    left, right, offset = attention.left, attention.right, attention.offset
    partly, wholly = ([0] * (sparse_m if by_query else sparse_n) for _ in range(2))
    other = per_n if by_query else per_m
    for i in range(sparse_m):
        low, high = i * side_m + offset, min((i + 1) * side_m, rows) - 1 + offset
        for j in range(sparse_n):
            first, last = j * side_n, min((j + 1) * side_n, keys) - 1
            hidden = (right is not None and first > high + right) or (left is not None and last < low - left)
            whole = (right is None or last <= low + right) and (left is None or first >= high - left)
            at = i if by_query else j
            if not hidden:
                (wholly if whole and attention.masked and _banded_only(attention) else partly)[at] += other
    count, each = (math.ceil(rows / tile[0]), per_m) if by_query else (math.ceil(keys / tile[1]), per_n)
    return [partly[place // each] for place in range(count)], [wholly[place // each] for place in range(count)]


def _banded_only(attention: Any) -> bool:
    return not {"prefix", "q_documents", "mask"}.intersection(attention.captured) and attention.chunk is None
