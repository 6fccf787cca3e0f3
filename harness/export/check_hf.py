"""Lets Hugging Face's `kernels` load what an export to `hf-kernel` wrote: run by `harness.export.hf_kernel`, in its own process.

Nothing of FlashTune is imported here but what the package itself brings. Triton interprets.
"""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any


def check(kernels: Any, folder: Path, question: Any) -> str:
    """What was checked, in words. Raises `ValueError` that says what is not as it should be."""
    import torch

    package = kernels.get_local_kernel(folder)
    rust = importlib.import_module("kernels._rust")
    for variant in sorted((folder / "build").iterdir()):
        said = rust.Metadata.read_from_file(variant / "metadata.json").digest
        said.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, variant))
    for one in question["champions"]:
        asked = {**one["question"], "variants": tuple(one["question"]["variants"]), "device": torch.device("cpu")}
        package.DEVICE = one["device"]
        row = package.found(SimpleNamespace(**asked))
        if row is None:
            raise ValueError(f"no row answers for the champion of `{one['problem']}`")
        if package.lookup(SimpleNamespace(**asked)) != row["config"]:
            raise ValueError(f"the lookup gives another config than the row of `{one['problem']}`")
    package.DEVICE = None
    # Equal scores, and values that are all 1: the answer is known, and has no rounding.
    q, k = torch.zeros(2, 24, 4, 16), torch.zeros(2, 24, 2, 16)
    out = package.flash_attn_func(q, k, torch.ones(2, 24, 2, 16), causal=True)
    if out.shape != q.shape or not torch.equal(out, torch.ones_like(q)):
        raise ValueError("flash_attn_func does not give the mean of equal values")
    return (
        "get_local_kernel loaded it, the digests of all variants are those of its files, its lookup answered for "
        f"{len(question['champions'])} champions, and flash_attn_func ran in Triton's interpreter"
    )


def main() -> None:
    folder, question = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    try:
        kernels = importlib.import_module("kernels")
        said = {"version": kernels.__version__}
    except ModuleNotFoundError as missing:
        said = {"missing": str(missing.name)}
    else:
        try:
            said["check"] = check(kernels, folder, question)
        except (ValueError, RuntimeError) as refused:
            said["refused"] = str(refused)
    sys.stdout.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
