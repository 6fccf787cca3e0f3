"""A wheel carries the stock workspace beside the harness, for `flashtune init`; nothing else here needs a script.

The copy is made while building, so that git holds one; an editable install takes the checkout itself.
"""

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
# Only while it is imported: our `kernels/` must not stand before a distribution of that name, which hooks into builds.
sys.path.insert(0, str(ROOT))
from harness.stock import stock_files  # noqa: E402

sys.path.remove(str(ROOT))


class BuildWithStock(build_py):
    """Copies the stock workspace into `harness/_stock` of what is built."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib) / "harness" / "_stock"
        shutil.rmtree(target, ignore_errors=True)
        for name in stock_files(ROOT):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        stock = [] if self.editable_mode else list(stock_files(ROOT))
        target = Path(self.build_lib) / "harness" / "_stock"
        return [*super().get_outputs(include_bytecode), *(str(target / name) for name in stock)]


setup(cmdclass={"build_py": BuildWithStock})
