"""Champions of FlexAttention that nobody measured, for the targets that take them."""

from pathlib import Path
from typing import Any

from harness.champions import Champion, ChampionFile, Subject
from harness.problem import parse_problem
from harness.workspace import Workspace
from tests.fake_champions import champion, champion_file, keep

ROOT = Path(__file__).parents[2]
FWD = {"block_m": 128, "block_n": 64, "num_warps": 8, "num_stages": 2, "use_tma": False, "sparse": 128}
BWD = {
    "block_m1": 32, "block_n1": 64, "block_m2": 64, "block_n2": 32, "num_warps": 4, "num_stages": 3, "sparse": 128,
}  # fmt: skip
CAUSAL = "b2 h8/4 s1024 d64 bf16 causal"


def flex_champion(text: str, **changes: Any) -> Champion:
    """A champion for a problem; `changes` are of its config."""
    problem = parse_problem(text)
    config = {**(FWD if problem.pass_ == "fwd" else BWD), **changes}
    digest = Workspace(ROOT).kernel_digest(stem_of(problem.pass_))
    return champion(text, config=config, default=config, kernel_digest=digest, source_digest=digest)


def stem_of(pass_: str) -> str:
    return "flex_attention" if pass_ == "fwd" else "flex_attention_bwd"


def flex_file(pass_: str, *champions: Champion, family: str = "flex_attention", **changes: Any) -> ChampionFile:
    stem = stem_of(pass_)
    file = champion_file(*champions, kernel=stem, **changes)
    return file.model_copy(update={"kernel": Subject(name=stem, family=family, pass_=pass_)})  # type: ignore[arg-type]


def kept(folder: Path, *texts: str, **changes: Any) -> Path:
    """A folder with champion files of these problems."""
    for pass_ in ("fwd", "bwd"):
        found = [flex_champion(text, **changes) for text in texts if parse_problem(text).pass_ == pass_]
        if found:
            keep(folder, flex_file(pass_, *found))
    return folder
