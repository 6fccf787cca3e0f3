"""Modules that these tests share, loaded by path: test folders are no packages."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"properties_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated() -> ModuleType:
    """The flash kernel emulated in torch."""
    return load(HERE.parent / "gate" / "emulated_flash.py")


@pytest.fixture(scope="session")
def sdpa() -> ModuleType:
    return load(HERE / "sdpa.py")


@pytest.fixture(scope="session")
def problems() -> ModuleType:
    return load(HERE / "problems.py")
