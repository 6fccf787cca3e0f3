"""The workspace: where `kernels/`, `search_spaces/` and `results/` are, and how a file in them becomes a subject.

The only module that reads environment variables and the only one that touches `sys.path`. Refuses a module that was
loaded from anywhere else, because another distribution also ships a top-level `kernels`.
"""

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.errors import UsageError, WorkspaceError, did_you_mean
from harness.problem import PASSES, Pass

_PARTS = ("kernels", "search_spaces")


@dataclass(frozen=True, slots=True)
class Workspace:
    """A folder with `kernels/` and `search_spaces/`; a stem present in both is a subject."""

    root: Path

    @property
    def results(self) -> Path:
        return self.root / "results"

    @property
    def stems(self) -> list[str]:
        """Names of all subjects, sorted."""
        found = [{path.stem for path in (self.root / part).glob("*.py")} for part in _PARTS]
        return sorted(name for name in found[0] & found[1] if not name.startswith("_"))

    def check_stem(self, stem: str) -> str:
        """Return `stem`, or raise a `UsageError` that lists the stems there are."""
        if stem in self.stems:
            return stem
        places = [
            f"  looked in {self.root / part}: {', '.join(_stems_in(self.root / part)) or 'nothing'}" for part in _PARTS
        ]
        raise UsageError(
            "\n".join([f"no kernel with a search space is called `{stem}`", *places]),
            hint=did_you_mean(stem, self.stems),
        )

    def load_kernel(self, stem: str) -> ModuleType:
        """Import `kernels/STEM.py`; this imports torch and triton."""
        return self._load("kernels", self.check_stem(stem))

    def load_space(self, stem: str) -> ModuleType:
        """Import `search_spaces/STEM.py`."""
        return self._load("search_spaces", self.check_stem(stem))

    def kernel_pass(self, stem: str) -> Pass:
        """The pass that a kernel computes, read from its source without running it."""
        value = self._constant(stem, "PASS")
        if value in PASSES:
            return value  # type: ignore[no-any-return]
        raise WorkspaceError(
            f"{self.root / 'kernels' / stem}.py does not say which pass it computes",
            hint='write `PASS = "fwd"` or `PASS = "bwd"`',
        )

    def kernel_family(self, stem: str) -> str:
        """Whose kernel it is, which alone may use configs tuned with it: `FAMILY` in its source, else `flashtune`."""
        return str(self._constant(stem, "FAMILY") or "flashtune")

    def kernel_unseen(self, stem: str) -> tuple[str, ...]:
        """What no run on a CPU shows of a kernel that PyTorch compiles: `UNSEEN` in its source."""
        return tuple(self._constant(stem, "UNSEEN") or ())

    def _constant(self, stem: str, name: str) -> Any:
        path = self.root / "kernels" / f"{self.check_stem(stem)}.py"
        for node in _parse(path).body:
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
                return ast.literal_eval(node.value)
        return None

    def kernel_parameters(self, stem: str) -> tuple[str, ...]:
        """The parameters of a kernel's `launches`, read from its source without running it."""
        path = self.root / "kernels" / f"{self.check_stem(stem)}.py"
        for node in _parse(path).body:
            if isinstance(node, ast.FunctionDef) and node.name == "launches":
                given = node.args
                return tuple(one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs))
        raise WorkspaceError(
            f"{path} has no function `launches`", hint="see kernels/__init__.py for what a kernel file has"
        )

    def kernel_digest(self, stem: str) -> str:
        """Digest of a kernel's code and of every sibling that it imports; comments, blank lines and docstrings do not count."""
        files = with_siblings(self.root / "kernels", self.check_stem(stem))
        digest = hashlib.sha256()
        for path in sorted(files):
            digest.update(path.name.encode() + b"\0" + described(_without_docstrings(_parse(path))).encode() + b"\0")
        return digest.hexdigest()[:16]

    def _load(self, part: str, stem: str) -> ModuleType:
        if sys.path[:1] != [str(self.root)]:
            sys.path.insert(0, str(self.root))
        package = importlib.import_module(part)
        _require_inside(package, part, self.root)
        module = importlib.import_module(f"{part}.{stem}")
        _require_inside(module, f"{part}.{stem}", self.root)
        return module


def find_workspace(given: str | Path | None = None) -> Workspace:
    """The workspace at `given`, else the nearest parent of the current folder that holds one.

    Raises `WorkspaceError` naming the folders that were looked at.
    """
    if given is not None:
        root = Path(given).resolve()
        if not _is_workspace(root):
            raise WorkspaceError(
                f"{root} is not a workspace: it needs the folders {' and '.join(f'`{part}/`' for part in _PARTS)}"
            )
        return Workspace(root)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if _is_workspace(folder):
            return Workspace(folder)
    raise WorkspaceError(
        f"no workspace here: neither {here} nor a folder above it holds `kernels/` and `search_spaces/`",
        hint="run inside a checkout, or pass `--workspace DIR`",
    )


def environment(name: str, default: str = "") -> str:
    """The value of an environment variable. Everything else asks here, so that one search finds all of them."""
    return os.environ.get(name, default)


def set_environment(name: str, value: str) -> None:
    """Give a variable to this process and its children, unless the caller has."""
    os.environ.setdefault(name, value)


def package_version(package: str) -> str | None:
    """The installed version of a package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def triton_cache() -> Path:
    """Folder of compiled kernels: `TRITON_CACHE_DIR` if set, else `flashtune/triton` in the user's cache folder."""
    given = environment("TRITON_CACHE_DIR")
    if given:
        return Path(given)
    base = environment("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashtune" / "triton"


def _is_workspace(folder: Path) -> bool:
    return all((folder / part).is_dir() for part in _PARTS)


def _stems_in(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))


def _require_inside(module: ModuleType, name: str, root: Path) -> None:
    places = [module.__file__] if module.__file__ else [str(place) for place in module.__path__]
    for place in places:
        if not Path(place).resolve().is_relative_to(root.resolve()):
            raise WorkspaceError(
                f"`{name}` was imported from {place}, not from the workspace {root}",
                hint="start `flashtune` in a fresh process, inside the workspace or with `--workspace DIR`",
            )


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise WorkspaceError(f"{path}, line {error.lineno}, is not Python: {error.msg}") from error


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return tree


def described(node: Any) -> str:
    """A syntax tree in words, without lines and columns: what `ast.dump` of Python 3.11 says.

    Its own text changes from one Python to the next, and a kernel is the same code under all of them.
    """
    if isinstance(node, list):
        return f"[{', '.join(described(each) for each in node)}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    parts = []
    for name in node._fields:
        value = getattr(node, name, None)
        later = name == "type_params" and not value  # a field since Python 3.12
        if later or not hasattr(node, name) or (value is None and getattr(type(node), name, ...) is None):
            continue
        parts.append(f"{name}={described(value)}")
    return f"{type(node).__name__}({', '.join(parts)})"


def with_siblings(folder: Path, stem: str) -> set[Path]:
    """The file of `stem` and, transitively, the sibling files that it imports relatively."""
    found: set[Path] = set()
    waiting = [folder / f"{stem}.py", folder / "__init__.py"]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(_parse(path)):
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                waiting += [folder / f"{name.split('.')[0]}.py" for name in names]
    return found


# The code of the suite that proves finalists and that fuzzes: a verdict, and a measured kill rate, belongs to one version of it.
SUITE_MODULES = (
    "notation", "problem", "inputs", "scales", "oracle", "noise", "forward_noise", "backward_noise", "bounds", "compare",
    "operation", "subject", "interpreter", "quicken", "shadow", "footprint", "laws", "probes", "metamorphic", "identities",
    "leaks", "properties", "cases", "judges", "suite",
)  # fmt: skip


@functools.cache
def digest_modules(names: tuple[str, ...]) -> str:
    """Digest of the code of harness modules by name; comments, blank lines and docstrings do not count."""
    digest = hashlib.sha256()
    for name in names:
        path = Path(__file__).parent / f"{name}.py"
        digest.update(name.encode() + b"\0" + described(_without_docstrings(_parse(path))).encode() + b"\0")
    return digest.hexdigest()[:16]
