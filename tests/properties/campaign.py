"""Run in the interpreter: properties of the stock kernels, or of planted ones, on random small problems; JSON lines on stdout.

usage: campaign.py correct SEED PROBLEMS SHARE [double]   false alarms: a random share of the properties on random problems
       campaign.py planted KERNELS SCRATCH KINDS NAME ... kills: properties of some kinds on planted bugs (no name: on all)
"""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(ROOT))

from mutants import MUTANTS, plant  # noqa: E402
from problems import config_of, random_problem  # noqa: E402

from harness.compare import sentence  # noqa: E402
from harness.problem import parse_problem  # noqa: E402
from harness.properties import MEMORY, PROPERTIES, agreement, property_for  # noqa: E402
from harness.subject import KernelSubject  # noqa: E402


def say(line: dict) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def verdicts(kernel, problem, seed, share=1.0, **options) -> list[dict]:
    """One line per property, for a random `share` of them."""
    found = []
    chosen = np.random.default_rng(seed).random(len(PROPERTIES)) < share
    for position, law in enumerate(PROPERTIES):
        rng = np.random.default_rng([seed, position])
        if not chosen[position]:
            continue
        subject = KernelSubject(kernel=kernel, config=config_of(problem.pass_, rng), **options)
        if law.applies(problem, subject.contract(problem)) is not None:
            continue
        begun = time.perf_counter()
        checks = law.judge(subject, problem, rng)
        failed = [check for check in checks if not check.ratio <= 1]
        found.append({
            "property": law.name, "kind": law.kind, "problem": str(problem), "seed": seed, "checks": len(checks),
            "elements": sum(check.elements for check in checks), "seconds": time.perf_counter() - begun,
            "failed": [f"{check.output}{check.index} {check.case}: {check.detail} ratio {check.ratio:.3g} error"
                       f" {check.error:.3g}" for check in failed],
            "worst": max((check.ratio for check in checks if check.bound > 0), default=0.0),
        })  # fmt: skip
    return found


def correct(seed: int, count: int, share: float, double: bool) -> None:
    kernels = {pass_: importlib.import_module(f"kernels.flash_{pass_}") for pass_ in ("fwd", "bwd")}
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        problem = random_problem(rng, ("fwd", "bwd")[number % 2])
        for line in verdicts(kernels[problem.pass_], problem, seed * 100000 + number, share, double=double):
            say(line)
        subjects = [KernelSubject(kernel=kernels[problem.pass_], config=config_of(problem.pass_, rng)) for _ in range(3)]
        checks = agreement(subjects, problem, rng)
        failed = [str(check) for check in checks if not check.ratio <= 1]
        say({"property": "agreement", "problem": str(problem), "seed": seed, "checks": len(checks), "failed": failed})


CASES = (
    "b1 h4/2 q37 k48 d20/16 bf16 causal window=9",
    "b2 h2/1 s40 d16/24 fp16",
    "b1 h2 q48 k33 d16 fp16 causal",
    "b1 h4/2 q24 k40 d16 bf16 causal top-left scale=-0.25",
    "b1 h2/1 s100 d16 fp16 window=20:5",
)


def planted(kernels: str, scratch: str, kinds: str, names: list[str]) -> None:
    """Which properties of the kinds named kill each mutant; the cases end with the first that any exact one does."""
    sys.path.insert(0, scratch)
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        package = plant(mutant, Path(kernels), Path(scratch))
        killed: dict[str, str] = {}
        asked = 0
        begun = time.perf_counter()
        for number, text in enumerate(CASES):
            for pass_ in mutant.passes:
                kernel = importlib.import_module(f"{package}.flash_{pass_}")
                problem = parse_problem(f"{text} {pass_}")
                asked += 1
                for name, how in kills(kernel, problem, number, kinds).items():
                    killed.setdefault(name, how)
            if any(property_for(name).kind == "exact" for name in killed):
                break
        say({
            "mutant": mutant.name, "passes": mutant.passes, "cases": asked, "seconds": time.perf_counter() - begun,
            "exact": {name: how for name, how in killed.items() if property_for(name).kind == "exact"},
            "other": {name: how for name, how in killed.items() if property_for(name).kind != "exact"},
        })  # fmt: skip


def kills(kernel, problem, seed: int, kinds: str) -> dict[str, str]:
    """What each property that fails says first."""
    found = {}
    for position, law in enumerate(PROPERTIES):
        rng = np.random.default_rng([seed, position])
        subject = KernelSubject(kernel=kernel, config=config_of(problem.pass_, rng))
        if law.kind not in kinds or law.applies(problem, subject.contract(problem)) is not None:
            continue
        try:
            failed = [check for check in law.judge(subject, problem, rng) if not check.ratio <= 1]
        except Exception as error:
            found[law.name] = f"raised {type(error).__name__}: {error}"[:100]
            continue
        if failed:
            # What the numbers say counts more than a fault that every property sees.
            numeric = [check for check in failed if check.output != MEMORY]
            found[law.name] = sentence((numeric or failed)[0]) if numeric else "memory: " + failed[0].detail
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "correct":
        correct(int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), "double" in sys.argv)
    else:
        planted(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:])
