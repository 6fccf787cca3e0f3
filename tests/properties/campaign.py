"""Run in the interpreter: a random share of the properties of the stock kernels on random small problems; JSON lines on stdout.

usage: campaign.py SEED PROBLEMS SHARE [double]
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

from problems import config_of, random_problem  # noqa: E402

from harness.properties import PROPERTIES, agreement  # noqa: E402
from harness.quicken import quicken  # noqa: E402
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
        begun = time.process_time()
        checks = law.judge(subject, problem, rng)
        failed = [check for check in checks if not check.ratio <= 1]
        found.append({
            "property": law.name, "kind": law.kind, "problem": str(problem), "seed": seed, "checks": len(checks),
            "elements": sum(check.elements for check in checks), "seconds": time.process_time() - begun,
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
        subjects = [
            KernelSubject(kernel=kernels[problem.pass_], config=config_of(problem.pass_, rng)) for _ in range(3)
        ]
        checks = agreement(subjects, problem, rng)
        failed = [str(check) for check in checks if not check.ratio <= 1]
        say({"property": "agreement", "problem": str(problem), "seed": seed, "checks": len(checks), "failed": failed})


if __name__ == "__main__":
    quicken()
    torch.set_num_threads(1)
    correct(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), "double" in sys.argv)
