"""Pretends, to every Python process that finds this file first, that torch sees a GPU: its memory is the CPU's, its kernels run
in Triton's interpreter, its clock is the wall's, and a graph does nothing when it is replayed.

For a rehearsal of everything around a GPU that is not here. Nothing in it may be taken for a measurement.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace


def _pretend() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    def here(value):
        if isinstance(value, torch.device):
            return torch.device("cpu") if value.type == "cuda" else value
        return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            named = {name: here(value) for name, value in (kwargs or {}).items()}
            return function(*(here(value) for value in args), **named)

    class Event:
        def __init__(self, enable_timing=False):
            self.at = 0.0

        def record(self, stream=None):
            self.at = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return max((end.at - self.at) * 1e3, 1e-4)

    class Nothing:
        def __init__(self, *arguments, **named):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def wait_stream(self, other):
            pass

        def replay(self):
            pass

    facts = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=150 << 30, warp_size=32,
        max_threads_per_multi_processor=2048, shared_memory_per_block=49152, shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472, L2_cache_size=62914560, clock_rate=1980000, uuid=None,
    )  # fmt: skip
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_properties = lambda *which: facts
    cuda.get_device_name = lambda *which: facts.name
    cuda.mem_get_info = lambda *which: (4 << 20, 150 << 30)
    cuda.synchronize = cuda.reset_peak_memory_stats = lambda *which: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *which: 0
    cuda.current_stream = lambda *which: Nothing()
    cuda.Event, cuda.Stream, cuda.CUDAGraph = Event, Nothing, Nothing
    cuda.device, cuda.stream, cuda.graph = Nothing, Nothing, Nothing
    made = torch.Generator

    class Generator:
        def __new__(cls, device="cpu"):
            return made(here(device))

    torch.Generator = Generator
    OnTheCpu().__enter__()


def _pretend_a_node() -> None:
    """What the kernel's driver would have made, so that the command line looks for a GPU at all."""
    exists = Path.exists
    Path.exists = lambda self, **named: str(self) == "/dev/nvidiactl" or exists(self, **named)


if os.environ.get("FLASHTUNE_PRETENDED_GPU") == "1":
    _pretend_a_node()
    # What is compiled cannot run here.
    if "harness.fuzz_child" in sys.orig_argv:
        os.environ["TRITON_INTERPRET"] = "1"
    _pretend()
