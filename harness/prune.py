"""Static rules on an artifact: what need not be run to be refused.

Refuses to guess: every rule compares a number that was read from the binary with a documented limit. A rule that prunes
wrongly hides a champion, so limits err towards letting a candidate run.
"""

from collections.abc import Callable
from dataclasses import dataclass

from harness.device import DeviceFacts
from harness.outcome import Artifact, Binary, Pruned
from harness.space import Config

# A spilled register costs a store and a load through L1 in every iteration. Sixteen of them are lost in the noise of an
# attention loop of hundreds of instructions. Chosen, not measured: a candidate that spills more could still win.
SPILL_LIMIT_BYTES = 64


@dataclass(frozen=True, slots=True)
class StaticRule:
    """A named limit: `broken(binary, config, device)` says in words what is asked and what there is, or None if it
    holds."""

    name: str
    why: str
    broken: Callable[[Binary, Config, DeviceFacts], str | None]


def _shared_memory(binary: Binary, config: Config, device: DeviceFacts) -> str | None:
    if binary.shared_bytes <= device.shared_bytes_per_block:
        return None
    return f"needs {_kib(binary.shared_bytes)} of shared memory, device has {_kib(device.shared_bytes_per_block)}"


def _registers(binary: Binary, config: Config, device: DeviceFacts) -> str | None:
    if binary.registers > device.registers_per_thread:
        return f"needs {binary.registers} registers per thread, device has {device.registers_per_thread}"
    block = block_registers(binary, device)
    if block > device.registers_per_sm:
        return f"needs {block} registers per block, device has {device.registers_per_sm}"
    return None


def _spills(binary: Binary, config: Config, device: DeviceFacts) -> str | None:
    if binary.spill_bytes <= SPILL_LIMIT_BYTES:
        return None
    return f"spills {binary.spill_bytes} bytes per thread, limit is {SPILL_LIMIT_BYTES}"


def _trap(binary: Binary, config: Config, device: DeviceFacts) -> str | None:
    if not binary.instructions or any(binary.instructions.get(kind) for kind in _STORES):
        return None
    return "stores nothing: the compiler left a trap in its place, as where tensor memory does not suffice"


def _warp_specialization(binary: Binary, config: Config, device: DeviceFacts) -> str | None:
    if config.get("warp_specialize") is not True or binary.specialized or not binary.loops:
        return None
    return f"asked for warp specialization, the compiler launched {binary.warps} plain warps"


_STORES = ("global_store", "atomic", "tma")

RULES: tuple[StaticRule, ...] = (
    StaticRule("trap", "code that stores nothing computes nothing", _trap),
    StaticRule("shared_memory", "a block over the limit of shared memory cannot be launched", _shared_memory),
    StaticRule("registers", "a block over the limit of registers cannot be launched", _registers),
    StaticRule("spills", "registers kept in memory are paid for in every iteration", _spills),
    StaticRule(
        "warp_specialization",
        "where the compiler silently leaves it out, the code is that of another config",
        _warp_specialization,
    ),
)


def prune(artifact: Artifact, config: Config, device: DeviceFacts) -> Pruned | None:
    """The first broken rule, over the binaries in launch order, or None if the candidate may run."""
    for binary in artifact.binaries:
        for rule in RULES:
            detail = rule.broken(binary, config, device)
            if detail is not None:
                return Pruned(rule=rule.name, detail=f"`{binary.kernel}` {detail}")
    return None


def block_registers(binary: Binary, device: DeviceFacts) -> int:
    """Registers that one block occupies: the hardware hands them out by warp, in units of 8 per thread."""
    return -(-binary.registers // 8) * 8 * device.warp_size * binary.warps


def blocks_per_multiprocessor(binary: Binary, device: DeviceFacts) -> int:
    """Blocks that fit on a multiprocessor at once, by registers, shared memory, warps and slots; 0 if none does.

    NVIDIA keeps 1 KiB of shared memory of every block for itself from compute capability 8.0 on.
    """
    reserved = 1024 if device.compute_capability >= 80 else 0
    shared = binary.shared_bytes + reserved
    return min(
        device.registers_per_sm // max(block_registers(binary, device), 1),
        device.shared_bytes_per_sm // shared if shared else device.blocks_per_sm,
        device.warps_per_sm // binary.warps,
        device.blocks_per_sm,
    )


def _kib(size: int) -> str:
    return f"{size / 1024:.0f} KiB" if size % 1024 == 0 else f"{size / 1024:.1f} KiB"
