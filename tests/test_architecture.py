"""The shape of the code: who may import whom, how large a module may grow, what may never be imported by name."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A module imports only from lines above its own; modules of one line may import one another without a cycle.
LAYERS = (
    ("errors", "notation", "problem", "stats", "operation"),
    (
        "space",
        "device",
        "paging",
        "scales",
        "inputs",
        "oracle",
        "loops",
        "noise",
        "forward_noise",
        "backward_noise",
        "bounds",
        "compare",
        "workspace",
        "workload",
        "sensor",
        "sensor_amd",
        "footprint",
        "files",
        "sealed",
    ),
    ("outcome", "prune", "probe", "sanitizer", "profiler", "readiness", "champions"),
    ("keeping", "trust", "likeness"),
    ("lookup",),
    ("attending", "table"),
    ("subject",),
    ("adapters", "libraries", "witness", "foreign"),
    (
        "binary",
        "flow",
        "inductor",
        "compile",
        "estimate",
        "measure",
        "timing",
        "gate_cases",
        "verify",
        "forest",
        "gaussian",
        "untried",
        "surrogate",
        "launchwise",
        "search",
        "landscape",
        "replay",
        "rivals",
        "experience",
        "past",
        "store",
        "shared",
        "interpreter",
        "quicken",
        "shadow",
        "recorded",
        "judging",
        "beside",
        "ceilings",
        "estimates",
        "canary",
        "quarantine",
        "selection",
        "portfolio",
    ),
    ("laws", "probes", "metamorphic", "identities", "leaks", "properties"),
    ("cases", "judges", "criteria", "suite", "shrink", "proof"),
    ("child",),
    ("worker",),
    ("simulated",),
    ("replayed", "trials", "lanes"),
    ("campaign", "truth", "answers", "campaign_plan"),
    ("ahead", "fleet"),
    ("fuzz_child", "traffic_child", "fuzz", "mutate_judges", "mutate_child", "mutate", "in_process", "pytest_plugin"),
    ("tune",),
    ("several",),
    ("crown", "fleet_study", "launch_study", "studies"),
    ("champion_documents", "search_documents", "export_documents", "bench_documents"),
    ("documents", "support"),
    # The modules of a package share its place.
    ("export",),
    ("evidence", "findings", "finders", "pictures"),
    (
        "report",
        "report_proof",
        "report_show",
        "report_mutants",
        "report_campaign",
        "report_lookup",
        "report_portfolio",
        "report_replay",
        "report_export",
        "report_bench",
    ),
    ("tables", "charts_space", "charts", "page", "page_md"),
    ("commands", "proving", "mutating", "showing", "replaying", "fleeting"),
    ("renewing", "lookups", "exporting", "comparing", "reporting", "stock"),
    ("bench", "lab_truth", "lab_tuning", "lab_beside", "lab"),
    ("campaigning", "benching"),
    ("cli",),
    ("__main__", "__init__"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted((ROOT / "harness").rglob("*.py"))


def place_of(path: Path) -> str:
    """The name that a module has in `LAYERS`: its own, or that of its package."""
    return path.stem if path.parent.name == "harness" else path.parent.name


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def imported_harness_modules(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("harness.")} & RANK.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_arrow_points_up(path: Path) -> None:
    place = place_of(path)
    assert place in RANK, f"give {place} a layer"
    for name in imported_harness_modules(path) - {place}:
        assert RANK[name] <= RANK[place], f"{path.stem} imports {name}, which lies above it"


def test_there_is_no_cycle() -> None:
    arrows: dict[str, set[str]] = {}
    for path in MODULES:
        arrows.setdefault(place_of(path), set()).update(imported_harness_modules(path) - {place_of(path)})
    done: set[str] = set()
    while len(done) < len(arrows):
        ready = {name for name, needs in arrows.items() if name not in done and needs <= done}
        assert ready, f"a cycle among {sorted(set(arrows) - done)}"
        done |= ready


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_harness_names_no_kernel_and_no_space(path: Path) -> None:
    assert not {name for name in imported(path) if name.split(".")[0] in ("kernels", "search_spaces")}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").glob("*.py")), ids=lambda path: path.stem)
def test_kernels_need_torch_triton_and_the_standard_library_only(path: Path) -> None:
    allowed = {
        "torch",
        "triton",
        "collections",
        "contextlib",
        "dataclasses",
        "functools",
        "math",
        "typing",
        "itertools",
        "json",
        "os",
        "types",
        "warnings",
    }
    absolute = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    assert absolute <= allowed


@pytest.mark.parametrize("path", sorted((ROOT / "search_spaces").glob("*.py")), ids=lambda path: path.stem)
def test_spaces_are_values_about_kernels(path: Path) -> None:
    from_harness = {name for name in imported(path) if name.startswith("harness")}
    assert all(name.startswith(("harness.space", "harness.problem", "harness.device")) for name in from_harness)
    assert not {name for name in imported(path) if name.split(".")[0] in ("torch", "triton", "kernels")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_modules_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    reads = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") and ast.unparse(node.value) == "os"
    ]
    # The worker, its children and what checks an export for a consumer set variables; only the workspace reads any.
    set_some = path.stem in ("worker", "child") or (
        place_of(path) == "export" and (path.stem == "base" or path.stem.startswith("check_"))
    )
    assert not reads or path.stem == "workspace" or set_some


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_compare_says_what_is_close(path: Path) -> None:
    banned = {"allclose", "isclose", "assert_close", "assert_allclose"}
    used = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    assert not used & banned
