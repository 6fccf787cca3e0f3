"""Kernel Tuner's strategies on recorded spaces, in its own simulation mode: what ours are compared with.

It reads the same file, counts a config once, and spends the same budget. Its random numbers are Python's and numpy's global
ones, so this runs in processes of its own. Refuses to change a strategy's settings: each runs with its defaults.
"""

import contextlib
import gzip
import importlib.metadata
import importlib.util
import io
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import MachineError
from harness.replay import RecordedSpace, Replayed

PACKAGE = "kernel_tuner"
# Its default, which walks through the space in a random order, its evolutionary and local searches, its Bayesian optimizer,
# and the two whose publication calls them its best (van Stein et al. 2025, arXiv 2510.17899).
STRATEGIES = (
    "random_sample", "genetic_algorithm", "diff_evo", "simulated_annealing", "dual_annealing", "basinhopping", "pso",
    "firefly_algorithm", "mls", "greedy_mls", "greedy_ils", "bayes_opt", "hybrid_vndx", "adaptive_tabu_greywolf",
)  # fmt: skip
PREFIX = "kernel_tuner:"


def version() -> str:
    """Kernel Tuner's version. Raises `MachineError` if it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise MachineError(
            "Kernel Tuner is not installed, and `--strategies all` compares with it",
            hint="pip install 'flashtune[rivals]', or name the strategies, e.g. `--strategies default`",
        )
    return importlib.metadata.version("kernel-tuner")


def rival(recorded: RecordedSpace, strategy: str, *, budget: int, seed: int) -> Replayed:
    """What `harness.replay.replay` says of one of ours, of the Kernel Tuner strategy of that name."""
    import kernel_tuner

    random.seed(seed)
    # The generator that Kernel Tuner draws from.
    np.random.seed(seed)  # noqa: NPY002
    names = {param.name for param in recorded.params}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # It does not read compressed files, and appends to those that it reads.
        plain = Path(folder) / "recorded.json"
        content = recorded.path.read_bytes()
        plain.write_bytes(gzip.decompress(content) if recorded.path.suffix == ".gz" else content)
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            results, _ = kernel_tuner.tune_cache(
                str(plain), strategy=strategy, strategy_options={"max_fevals": budget}, quiet=True
            )
        spent = time.perf_counter() - began
    best, found = np.inf, []
    seen: set[tuple[Any, ...]] = set()
    for result in results:
        key = tuple(str(value) for name, value in (result or {}).items() if name in names)
        if not key or key in seen:
            continue
        seen.add(key)
        time_ms = result["time"]
        if isinstance(time_ms, int | float):
            best = min(best, time_ms)
        found.append(recorded.best_ms / best)
    return Replayed(
        space=recorded.name, strategy=PREFIX + strategy, seed=seed, fractions=tuple(found),
        ms_per_trial=1000 * spent / max(len(found), 1),
    )  # fmt: skip
