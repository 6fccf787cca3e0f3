"""A campaign with real children on a GPU that is pretended, on problems so small that the interpreter does them in a moment.

Usage, with `pretended/` first on the path and FLASHTUNE_PRETENDED_GPU=1:
python -m tests.campaign.rehearse WORKSPACE OUT MINUTES [OPTION ...]

Children that multiprocessing spawns import this file before they know whether Triton interprets in them, so it imports nothing of
ours by itself.
"""

import dataclasses
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

TINY = "b1 h2 s64 d16 fp16"


def interpreting_pools() -> None:
    """What is compiled cannot run here: only compilers do not interpret."""
    from harness import worker

    real_pool, real_variables = worker.ProcessRunner._pool, worker._variables

    def pool(self: Any, name: Any) -> Any:
        variables = mock.patch.object(
            worker, "_variables", lambda *, interpret: real_variables(interpret=name != "compiler")
        )
        with variables:
            return real_pool(self, name)

    worker.ProcessRunner._pool = pool  # type: ignore[method-assign]


def few_parts() -> None:
    """One part of each kind and kernel, on a tiny problem where a problem of full size is meant."""
    from harness import campaign_plan, campaigning
    from harness.problem import parse_problem

    real = campaigning.plan

    def few(subjects: Any, workloads: Any, **named: Any) -> Any:
        seen: Counter[Any] = Counter()
        kept = []
        for part in real(subjects, (), **named):
            kind = (part.what["do"], part.what.get("kernel"))
            seen[kind] += 1
            # Rows that share a tile differ in their last bits where the interpreter makes it, which no judge expects of a device.
            if seen[kind] > 1 or kind[0] == "fuzz" or kind == ("champion", "flash_decode"):
                continue
            if kind[0] not in ("champion", "beside", "same"):
                kept.append(part)
                continue
            pass_ = parse_problem(part.what["problem"]).pass_
            what = {**part.what, "problem": str(parse_problem(f"{TINY} {pass_}")), "runs": 1}
            name = f"{part.step}/{what['kernel']}/{what['problem']}"
            kept.append(dataclasses.replace(part, what=what, name=name))
        return kept

    campaigning.plan = few  # type: ignore[assignment]
    campaign_plan.SPACES = (("flash_fwd", f"{TINY} fwd", ()),)


if __name__ == "__main__":
    from harness.cli import main

    interpreting_pools()
    few_parts()
    workspace, out, minutes, *more = sys.argv[1:]
    Path(out).mkdir(exist_ok=True)
    sys.exit(main(["campaign", "--out", out, "--minutes", minutes, "--workspace", workspace, "--jobs", "2", *more]))
