"""What our strategies are compared with on recorded spaces: Kernel Tuner's, in its own simulation mode, and optuna's TPE.

Each counts a config once and spends the same budget. Kernel Tuner draws from Python's and numpy's global generators, so this
runs in processes of its own. Refuses to change a setting: each runs with its defaults.
"""

import contextlib
import functools
import gzip
import importlib.metadata
import importlib.util
import io
import json
import random
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from harness.errors import MachineError, UsageError
from harness.landscape import Landscape, parsed
from harness.replay import Replayed
from harness.space import Config

PACKAGE = "kernel_tuner"
PREFIX = "kernel_tuner:"
PLAIN_TPE = "optuna:tpe"
# Its default, which walks through the space in a random order, its evolutionary and local searches, its Bayesian optimizer,
# and the two whose publication calls them its best (van Stein et al. 2025, arXiv 2510.17899).
KERNEL_TUNER = (
    "random_sample", "genetic_algorithm", "diff_evo", "simulated_annealing", "dual_annealing", "basinhopping", "pso",
    "firefly_algorithm", "mls", "greedy_mls", "greedy_ils", "bayes_opt", "hybrid_vndx", "adaptive_tabu_greywolf",
)  # fmt: skip
# A sampler that does not know which configs are legal asks for many that are not; at some point it has had its chance.
_ASKS_PER_TRIAL = 30


def rivals() -> tuple[str, ...]:
    """All of them. Raises `MachineError` if Kernel Tuner is not installed."""
    kernel_tuner_version()
    return (*(PREFIX + name for name in KERNEL_TUNER), PLAIN_TPE)


def kernel_tuner_version() -> str:
    """Kernel Tuner's version. Raises `MachineError` if it is not installed."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise MachineError(
            "Kernel Tuner is not installed, and `--strategies all` compares with it",
            hint="pip install 'flashtune[rivals]', or name strategies, e.g. `--strategies ours`",
        )
    return importlib.metadata.version("kernel-tuner")


def rival(land: Landscape, name: str, *, budget: int, seed: int) -> Replayed:
    """What `harness.replay.replay` says of one of ours, of a rival. Raises `UsageError` for one that there is not, and where
    Kernel Tuner cannot read the file."""
    began = time.perf_counter()
    if name == PLAIN_TPE:
        tried = _plain_tpe(land, budget=budget, seed=seed)
    elif name.removeprefix(PREFIX) in KERNEL_TUNER:
        tried = _kernel_tuner(land, name.removeprefix(PREFIX), budget=budget, seed=seed)
    else:
        raise UsageError(
            f"there is no rival `{name}`", hint=f"{PLAIN_TPE}, or {PREFIX} and one of {', '.join(KERNEL_TUNER)}"
        )
    spent = time.perf_counter() - began
    best = np.inf
    fractions: list[float] = []
    seconds: list[float] = []
    for config in tried:
        recording = land.recordings[config]
        best = min(best, np.inf if recording.time_ms is None else recording.time_ms)
        fractions.append(land.best_ms / best)
        seconds.append(recording.compile_s + recording.run_s + (seconds[-1] if seconds else 0.0))
    return Replayed(
        space=land.name, strategy=name, seed=seed, fractions=tuple(fractions), seconds=tuple(seconds),
        ms_per_trial=1000 * spent / max(len(tried), 1),
    )  # fmt: skip


def _kernel_tuner(land: Landscape, strategy: str, *, budget: int, seed: int) -> list[Config]:
    if not land.path.name.removesuffix(".gz").endswith(".json"):
        raise UsageError(f"Kernel Tuner reads its own caches, and {land.path} is none", hint="name other strategies")
    random.seed(seed)
    # The generator that Kernel Tuner draws from.
    np.random.seed(seed)  # noqa: NPY002
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import kernel_tuner

        # It does not read compressed files, and may append to those that it reads; without the single runs, which no strategy
        # looks at, it reads them in a fifth of the time.
        plain = Path(folder) / "recorded.json"
        plain.write_bytes(_content(land.path))
        with contextlib.redirect_stdout(io.StringIO()):
            results, _ = kernel_tuner.tune_cache(
                str(plain), strategy=strategy, strategy_options={"max_fevals": budget}, quiet=True
            )
    found = (_config(land, result) for result in results if result)
    return list(dict.fromkeys(config for config in found if config is not None))


@functools.cache
def _content(path: Path) -> bytes:
    content = path.read_bytes()
    document = parsed((gzip.decompress(content) if path.suffix == ".gz" else content).decode())
    for entry in document["cache"].values():
        entry.pop("times", None)
    return json.dumps(document).encode()


def _config(land: Landscape, result: dict[str, Any]) -> Config | None:
    config = Config({param.name: _plain(result[param.name]) for param in land.params})
    return config if config in land.recordings else None


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain_tpe(land: Landscape, *, budget: int, seed: int) -> list[Config]:
    """A study as its tutorial shows one: categorical parameters, and what is not legal pruned."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=seed))
    budget = min(budget, len(land.recordings))
    tried: dict[Config, None] = {}
    for _ in range(_ASKS_PER_TRIAL * budget):
        if len(tried) == budget:
            break
        trial = study.ask()
        values: dict[str, Sequence[Any]] = {param.name: param.values for param in land.params}
        config = Config({name: trial.suggest_categorical(name, several) for name, several in values.items()})
        recording = land.recordings.get(config)
        if recording is None:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            continue
        tried[config] = None
        state = optuna.trial.TrialState.FAIL if recording.time_ms is None else None
        study.tell(trial, recording.time_ms, state=state)
    return list(tried)
