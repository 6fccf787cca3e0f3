"""A campaign with real children on a GPU that is pretended, on problems so small that the interpreter does them in a moment.

Usage, with `pretended/` first on the path and FLASHTUNE_PRETENDED_GPU=1: python -m tests.campaign.rehearse WORKSPACE OUT MINUTES
"""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from harness import campaign_plan, campaigning, worker
from harness.campaign import Part
from harness.cli import main
from harness.problem import parse_problem

TINY = "b1 h2 s64 d16 fp16"
REAL_PLAN, REAL_POOL, REAL_VARIABLES = campaigning.plan, worker.ProcessRunner._pool, worker._variables


def pool(self: worker.ProcessRunner, name: Any) -> Any:
    """What is compiled cannot run here: only compilers do not interpret."""
    with mock.patch.object(worker, "_variables", lambda *, interpret: REAL_VARIABLES(interpret=name != "compiler")):
        return REAL_POOL(self, name)


def few(subjects: Any, workloads: Any, **named: Any) -> Sequence[Part]:
    """One part of each kind and kernel, on a tiny problem where a problem of full size is meant."""
    seen: Counter[Any] = Counter()
    kept = []
    for part in REAL_PLAN(subjects, (), **named):
        kind = (part.what["do"], part.what.get("kernel"))
        seen[kind] += 1
        if seen[kind] > 1 or kind[0] == "fuzz":
            continue
        if kind[0] in ("champion", "beside", "same"):
            pass_ = parse_problem(part.what["problem"]).pass_
            what = {**part.what, "problem": str(parse_problem(f"{TINY} {pass_}")), "runs": 1}
            part = dataclasses.replace(part, what=what, name=f"{part.step}/{what['kernel']}/{what['problem']}")
        kept.append(part)
    return kept


if __name__ == "__main__":
    workspace, out, minutes = sys.argv[1:]
    worker.ProcessRunner._pool = pool  # type: ignore[method-assign]
    campaigning.plan = few  # type: ignore[assignment]
    campaign_plan.SPACES = (("flash_fwd", f"{TINY} fwd"),)
    campaigning.SPACES = campaign_plan.SPACES
    Path(out).mkdir(exist_ok=True)
    sys.exit(main(["campaign", "--out", out, "--minutes", minutes, "--workspace", workspace, "--jobs", "2", "--json"]))
