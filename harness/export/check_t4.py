"""Lets Kernel Tuner read what an export to `t4` wrote: run by `harness.export.t4` in a process of its own."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any


def check(folder: Path) -> str:
    """What was checked, in words. Raises `ValueError` that says what Kernel Tuner does not take."""
    jsonschema = importlib.import_module("jsonschema")
    schema = importlib.import_module("kernel_tuner.file_utils").output_file_schema("results")[1]
    documents = sorted(folder.glob("t4/*.json"))
    for path in documents:
        try:
            jsonschema.validate(json.loads(path.read_text()), schema)
        except jsonschema.ValidationError as error:
            raise ValueError(f"{path.name} is not as its T4 schema says: {error.message}") from error
    sys.path.insert(0, str(folder / "kernel-tuner"))
    simulate = importlib.import_module("simulate").simulate
    caches = sorted(folder.glob("kernel-tuner/*.json"))
    for path in caches:
        _simulate(simulate, path)
    return (
        f"{len(documents)} documents are as its T4 schema says, and tune_kernel(simulation_mode=True) searched {len(caches)} "
        "caches and found all of each, the best one too"
    )


def _simulate(simulate: Any, path: Path) -> None:
    """Let it search all configs that were tried."""
    told = json.loads(path.read_text())
    objective, entries = told["objective"], list(told["cache"].values())
    values = [entry[objective] for entry in entries if not isinstance(entry[objective], str)]
    found, _ = simulate(path, strategy="brute_force")
    valid = [one[objective] for one in found if "__error__" not in one]
    if len(found) != len(entries) or sorted(valid) != sorted(values):
        raise ValueError(f"it finds {len(found)} configs in {path.name}, {len(valid)} of them valid, of {len(entries)}")


def main() -> None:
    folder = Path(sys.argv[1])
    said: dict[str, str] = {}
    try:
        importlib.import_module("kernel_tuner")
        said["version"] = importlib.metadata.version("kernel_tuner")
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            said["check"] = check(folder)
    except ModuleNotFoundError as missing:
        said = {"missing": str(missing.name)}
    except ValueError as refused:
        said["refused"] = str(refused)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
