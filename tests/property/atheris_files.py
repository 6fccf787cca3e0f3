"""Champion files under atheris, which looks where coverage grows: `python -m tests.property.atheris_files -runs=50000`.

Atheris is no dependency of ours: `pip install atheris` where there is a wheel. It starts from a good file, and damages it; the
digest is then made right again, so that it gets past that.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["harness.champions", "harness.sealed", "harness.keeping"]):
    from harness import champions, sealed
    from harness.errors import ChampionError
    from harness.keeping import merge

from tests.property.test_hostile_files import TREE


def one(content: bytes) -> None:
    """Whatever the bytes are, they are a champion file or refused in words."""
    try:
        tree = sealed.parse(content, "it")
    except ChampionError:
        return
    for each in (content, sealed.sealed(tree)):
        try:
            found = champions.champions_from(each, "it")
        except ChampionError as refused:
            assert refused.message.isprintable()
        else:
            assert merge([("a", found), ("b", found)]) == found


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "good.json").write_bytes(sealed.sealed(TREE))
        atheris.Setup([*sys.argv, "-max_len=20000", folder], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
