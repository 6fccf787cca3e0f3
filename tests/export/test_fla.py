"""flash-linear-attention reads the exported folder with its own loader, in its strict mode, in a process of its own."""

import importlib.metadata
import json

import pytest

from harness.export.fla import key_hash
from tests.cli.desk import Desk
from tests.fake_champions import champion, champion_file, keep

KEY = [1024, 64, "torch.bfloat16", "torch.float32"]


@pytest.fixture
def theirs(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A workspace whose kernel is one of FLA's."""
    desk.edit('PASS = "fwd"\n', 'PASS = "fwd"\nFAMILY = "fla"\n')
    monkeypatch.setattr(
        desk.spaces, "space", lambda problem, device: type("Any", (), {"check": lambda self, config: config})()
    )
    return desk


def keep_theirs(desk: Desk, *champions) -> None:
    file = champion_file(*champions, kernel="subject", device="h100")
    keep(desk.results, file.model_copy(update={"kernel": file.kernel.model_copy(update={"family": "fla"})}))


def theirs_of(desk: Desk, problem: str, said=None, **changes):
    config = {"BS": 64, "num_warps": 4, "num_stages": 2, "num_ctas": 1}
    extra = {} if said is None else {"x-fla": said}
    return champion(problem, config=config, kernel_digest=desk.digest, source_digest=desk.digest, **changes, **extra)


def test_fla_finds_each_config_by_its_key(theirs: Desk) -> None:
    keep_theirs(
        theirs,
        theirs_of(theirs, "b1 h8 s1024 d64 bf16", {"kernel": "attn_decoding_kernel", "autotune_key": KEY}),
        theirs_of(
            theirs, "b1 h8 s2048 d64 bf16", {"kernel": "attn_decoding_kernel", "autotune_key": [2048, *KEY[1:]]}, kind="estimated"
        ),
        theirs_of(theirs, "b1 h8 s512 d64 bf16"),
        theirs_of(theirs, "b1 h8 s256 d64 bf16", {"kernel": "../../escape", "autotune_key": KEY}),
    )  # fmt: skip
    document = theirs.document("export", "--to", "fla", "--out", "out")
    path = theirs.root / "out/NVIDIA_H100_80GB_HBM3/attn_decoding_kernel.json"
    found = json.loads(path.read_text())
    assert found["default_config"] is None and found["autotune_entries"].keys() == {
        key_hash(KEY),
        key_hash([2048, *KEY[1:]]),
    }
    timed, estimated = (found["autotune_entries"][key_hash(key)] for key in (KEY, [2048, *KEY[1:]]))
    assert timed["config"] == {"kwargs": {"BS": 64}, "num_warps": 4, "num_stages": 2, "num_ctas": 1}
    assert timed["best_timing"] == [1.0]
    # What is no time stands in no place where times are.
    assert "best_timing" not in estimated and estimated["x-flashtune"]["number"] == "estimated"
    assert len(document["skipped"]) == 2 and all("`x-fla`" in one["reason"] for one in document["skipped"])
    assert list(path.parent.iterdir()) == [path]
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError:
        assert document["verified_by"] is None and "not installed here" in document["not_verified"]
        pytest.skip("fla-core is not installed (extra `consumers`)")
    assert (document["verified_by"]["package"], document["verified_by"]["version"]) == ("fla-core", version)
    assert "found 2 configs by their keys" in document["verified_by"]["check"]


def test_champions_of_our_kernels_are_not_for_fla(desk: Desk) -> None:
    keep(desk.results, champion_file(champion(kernel_digest=desk.digest, source_digest=desk.digest), kernel="subject"))
    document = desk.document("export", "--to", "fla", "--out", "out")
    assert document["files"] == {} and document["exported"] == []
    assert "runs kernels of `fla`" in document["skipped"][0]["reason"]
    code, out, _ = desk.run("export", "--to", "fla", "--out", "out")
    assert code == 0 and out.startswith("no champion to flash-linear-attention's config directory: 0 files in out")
