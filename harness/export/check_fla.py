"""Lets fla-core load what an export to `fla` wrote, in its mode `strict`: run by `harness.export.fla` in a process of its own."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any


class _Kernel:
    """A kernel as far as FLA's autotuner looks at one before it runs it."""

    arg_names = ("size",)

    def __init__(self, name: str) -> None:
        def fn() -> None: ...

        fn.__name__ = name
        self.fn = fn


def check(cache: Any, triton: Any, folder: Path) -> str:
    """What was checked, in words. Raises `ValueError` that says what FLA does not take."""
    taken = 0
    for path in sorted(folder.glob("*/*.json")):
        os.environ["FLA_CONFIG_DIR"] = str(path.parent)
        if cache.KernelConfigFile.from_file(path) is None:
            raise ValueError(f"its KernelConfigFile does not read {path.name}")
        for entry in json.loads(path.read_text())["autotune_entries"].values():
            key = cache.AutotuneKey(tuple(entry["autotune_key"]))
            if cache.load_cached_config(path.stem, key) != entry["config"]:
                raise ValueError(f"load_cached_config does not find {entry['autotune_key']} in {path.name}")
            tuner = cache.CachedAutotuner(_Kernel(path.stem), ["size"], [triton.Config({})], ["size"], None, None)
            tuner.maybe_load_cached_config(key, {}, {})
            config = {"ir_override": None, "pre_hook": None, "maxnreg": None, **entry["config"]}
            if tuner.cache[key.autotune_key].__dict__ != config:
                raise ValueError(f"its autotuner makes another config of {entry['autotune_key']}")
            taken += 1
        if cache.load_cached_config(path.stem, cache.AutotuneKey(("no such key",))) is not None:
            raise ValueError("load_cached_config answers for a key that is not there")
    return f"load_cached_config (strict) found {taken} configs by their keys, and its autotuner took them; another key got none"


def _loader() -> Any:
    """The module that loads configs, `fla.ops.utils.cache`, without all the kernels that `import fla` brings."""
    found = importlib.util.find_spec("fla")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'fla'", name="fla-core")
    path = Path(found.origin).parent / "ops/utils/cache.py"
    spec = importlib.util.spec_from_file_location("fla_ops_utils_cache", path)
    if spec is None or spec.loader is None or not path.exists():
        raise ValueError("this version has no ops/utils/cache.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    folder = Path(sys.argv[1])
    said: dict[str, str] = {}
    try:
        cache, triton = _loader(), importlib.import_module("triton")
        said["version"] = importlib.metadata.version("fla-core")
        said["check"] = check(cache, triton, folder)
    except ModuleNotFoundError as missing:
        said = {"missing": str(missing.name)}
    except ValueError as refused:
        said["refused"] = str(refused)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
