"""The implementations, importable by name as a user's are."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def implementations() -> ModuleType:
    """Imported under the name `foreign_implementations`, so that targets can name it."""
    import importlib.util

    name = "foreign_implementations"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE / "implementations.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
