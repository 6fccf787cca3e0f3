"""Let Kernel Tuner search what a cache file of this folder holds, without a GPU: `simulate("NAME.json", strategy=...)`.

Kernel Tuner's own `tune_cache` makes every combination of the values that occur, of which there are billions here, before it asks
which ones the file has. Needs Kernel Tuner and nothing else.
"""

import json
from pathlib import Path
from typing import Any


def simulate(path: Path | str, **given: Any) -> Any:
    """What `kernel_tuner.tune_kernel` returns, to which `given` goes: results and environment."""
    import kernel_tuner  # type: ignore[import-untyped, unused-ignore]
    from constraint import FunctionConstraint  # type: ignore[import-untyped, unused-ignore]

    told = json.loads(Path(path).read_text(encoding="utf-8"))
    names = told["tune_params_keys"]
    known = [tuple(entry[name] for name in names) for entry in told["cache"].values()]
    parts: dict[tuple[int, ...], set[tuple[Any, ...]]] = {}

    def leads_somewhere(*values: Any) -> bool:
        """Whether any known config has these values; what is not chosen yet is neither number nor text. It is asked early, so
        that a combination is given up at its first value that leads nowhere."""
        places = tuple(place for place, value in enumerate(values) if isinstance(value, int | str | float))
        if places not in parts:
            parts[places] = {tuple(one[place] for place in places) for one in known}
        return tuple(values[place] for place in places) in parts[places]

    said = {
        "kernel_name": told["kernel_name"], "kernel_source": "", "problem_size": told["problem_size"], "arguments": [],
        "tune_params": {name: told["tune_params"][name] for name in names}, "lang": "CUDA",
        "objective": told["objective"], "objective_higher_is_better": False, "quiet": True,
    }  # fmt: skip
    return kernel_tuner.tune_kernel(
        **(said | given), cache=str(path), simulation_mode=True,
        restrictions=[FunctionConstraint(leads_somewhere, assigned=False)],
    )  # fmt: skip
