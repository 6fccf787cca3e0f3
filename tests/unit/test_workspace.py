import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness.errors import UsageError, WorkspaceError
from harness.workspace import Workspace, described, find_workspace

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    for part in ("kernels", "search_spaces"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "__init__.py").write_text("")
    (tmp_path / "kernels" / "parts.py").write_text("def half(x):\n    return x / 2\n")
    (tmp_path / "kernels" / "unrelated.py").write_text("A = 1\n")
    (tmp_path / "kernels" / "subject.py").write_text('"""Doc."""\nfrom .parts import half\n\nPASS = "bwd"\n')
    (tmp_path / "search_spaces" / "subject.py").write_text("def space(problem, device):\n    return None\n")
    return Workspace(tmp_path)


def test_a_subject_has_a_kernel_and_a_space(workspace: Workspace) -> None:
    assert workspace.stems == ["subject"]
    assert workspace.kernel_pass("subject") == "bwd"


def test_an_unknown_stem_lists_what_there_is(workspace: Workspace) -> None:
    with pytest.raises(UsageError) as refused:
        workspace.check_stem("subjet")
    assert refused.value.message.startswith("no kernel with a search space is called `subjet`")
    assert f"looked in {workspace.root}/kernels: parts, subject, unrelated" in refused.value.message
    assert refused.value.hint == "did you mean `subject`?"


def test_a_kernel_that_does_not_say_its_pass_is_refused(workspace: Workspace) -> None:
    (workspace.root / "kernels" / "subject.py").write_text('PASS = "sideways"\n')
    with pytest.raises(WorkspaceError, match="does not say which pass it computes"):
        workspace.kernel_pass("subject")
    (workspace.root / "kernels" / "subject.py").write_text("PASS = \n")
    with pytest.raises(WorkspaceError, match=r"subject\.py, line 1, is not Python"):
        workspace.kernel_pass("subject")


def test_the_digest_covers_code_and_siblings_and_nothing_else(workspace: Workspace) -> None:
    folder = workspace.root / "kernels"
    before = workspace.kernel_digest("subject")
    (folder / "subject.py").write_text(
        '"""Other words."""\n# A comment.\n\nfrom .parts import half\n\n\nPASS = "bwd"\n'
    )
    (folder / "unrelated.py").write_text("A = 2\n")
    assert workspace.kernel_digest("subject") == before
    (folder / "parts.py").write_text("def half(x):\n    return x / 3\n")
    assert workspace.kernel_digest("subject") != before


def test_the_workspace_is_found_upwards(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = workspace.root / "kernels" / "a" / "b"
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    assert find_workspace().root == workspace.root


def test_no_workspace_is_said_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkspaceError, match="no workspace here") as refused:
        find_workspace()
    assert refused.value.hint == "run inside a checkout, or pass `--workspace DIR`"
    with pytest.raises(
        WorkspaceError, match="is not a workspace: it needs the folders `kernels/` and `search_spaces/`"
    ):
        find_workspace(tmp_path)


@pytest.mark.parametrize("imported_before", [False, True])
def test_a_foreign_kernels_package_is_not_taken_for_ours(tmp_path: Path, imported_before: bool) -> None:
    foreign = tmp_path / "site"
    (foreign / "kernels").mkdir(parents=True)
    (foreign / "kernels" / "__init__.py").write_text("FOREIGN = True\n")
    program = "\n".join(
        [
            "import kernels; assert kernels.FOREIGN" if imported_before else "",
            "from harness.errors import WorkspaceError",
            "from harness.workspace import find_workspace",
            "try:",
            f"    module = find_workspace({str(REPOSITORY)!r}).load_kernel('flash_fwd')",
            "    print('ours' if module.__file__.startswith(" + repr(str(REPOSITORY)) + ") else 'theirs')",
            "except WorkspaceError as error:",
            "    print(error.message)",
        ]
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{foreign}:{REPOSITORY}"}, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if imported_before:
        assert (
            done.stdout.strip()
            == f"`kernels` was imported from {foreign}/kernels/__init__.py, not from the workspace {REPOSITORY}"
        )
    else:
        assert done.stdout.strip() == "ours"


def test_importing_the_package_imports_neither_torch_nor_triton() -> None:
    program = "import sys, harness, harness.cli; print([name for name in ('torch', 'triton', 'optuna') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_digest_is_the_same_under_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse("def f(a, *, b=None):\n    return [a, -1.5] if b else (lambda: None)")
    constants = "Constant(value=None)", "UnaryOp(op=USub(), operand=Constant(value=1.5))"
    # What Python 3.11 says, to the letter; later ones leave out empty lists, or have more fields.
    assert described(tree) == (
        "Module(body=[FunctionDef(name='f', args=arguments(posonlyargs=[], args=[arg(arg='a')], kwonlyargs=[arg(arg='b')], "
        f"kw_defaults=[{constants[0]}], defaults=[]), body=[Return(value=IfExp(test=Name(id='b', ctx=Load()), "
        f"body=List(elts=[Name(id='a', ctx=Load()), {constants[1]}], ctx=Load()), orelse=Lambda(args=arguments(posonlyargs=[], "
        f"args=[], kwonlyargs=[], kw_defaults=[], defaults=[]), body={constants[0]})))], decorator_list=[])], type_ignores=[])"
    )
    if sys.version_info[:2] == (3, 11):
        for path in (REPOSITORY / "kernels").glob("*.py"):
            assert described(ast.parse(path.read_text())) == ast.dump(ast.parse(path.read_text()))
    before = described(tree)
    # As Python 3.12 has it.
    monkeypatch.setattr(ast.FunctionDef, "_fields", tuple(dict.fromkeys((*ast.FunctionDef._fields, "type_params"))))
    tree.body[0].type_params = []
    assert described(tree) == before
    tree.body[0].type_params = [ast.Name("T")]
    assert described(tree) != before
