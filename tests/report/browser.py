"""Headless Chromium, where it is installed: reads a page as a person's browser would, and keeps what its console said."""

import functools
import html
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed here (`apt-get install chromium`)"
)


class Browser:
    """A browser with a profile of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def dom(self, page: Path, *options: str, console: bool = True) -> str:
        """The document after its scripts have run. With `console`, nothing may have been said there."""
        assert CHROMIUM is not None
        done = subprocess.run(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             f"--user-data-dir={self.folder / 'profile'}", "--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000",
             *options, "--dump-dom", page.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        said = re.findall(r".*CONSOLE.*", done.stderr)
        assert not console or not said, said
        return done.stdout

    def asked(self, page: Path, script: str, *, width: int = 375, scripts: bool = True) -> dict[str, str]:
        """What a script of ours finds in the page, which is shown `width` pixels wide: it fills `found` by name.
        Without `scripts` the page's own does not run."""
        # A sandboxed frame runs nothing, and may still be looked at.
        sandbox = "" if scripts else "sandbox='allow-same-origin'"
        frame = self.folder / "frame.html"
        frame.write_text(
            f"<html><body><iframe {sandbox} src='{page.as_uri()}' style='width:{width}px;height:900px;border:0'></iframe>"
            "<dl></dl>"
            "<script>onload = () => { const page = document.querySelector('iframe').contentDocument; const found = {};"
            f"{script}; for (const [name, value] of Object.entries(found)) {{ const row = document.createElement('dt');"
            "row.textContent = name + '=' + String(value).replace(/\\s+/g, ' ');"
            "document.querySelector('dl').append(row); } };</script></body></html>"
        )
        # A sandbox says of each script that it did not run.
        dom = self.dom(frame, "--allow-file-access-from-files", f"--window-size={max(width, 500)},900", console=scripts)
        return dict(html.unescape(pair).split("=", 1) for pair in re.findall(r"<dt>(.*?)</dt>", dom))


@functools.cache
def version() -> str:
    """The browser's own words."""
    assert CHROMIUM is not None
    return subprocess.run([CHROMIUM, "--version"], capture_output=True, text=True, timeout=60).stdout.strip()
