"""The page and the tables for a pull request: one file, nothing from elsewhere, nothing from a file as markup."""

import base64
import hashlib
import importlib.util
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest

from harness import documents
from harness.cli import main
from harness.errors import MachineError, UsageError
from harness.evidence import gather
from harness.finders import find
from harness.page import SECTIONS, page
from harness.page_md import markdown
from tests import fake_champions
from tests.report import made_up
from tests.report.browser import Browser, needs_chromium
from tests.report.made_up import FORWARD, HOSTILE

_VOID = {"meta", "input", "br", "img", "link", "hr"}
MADE = "made up in a test"


class Reader(HTMLParser):
    """Reads a page strictly: what is opened is closed, in order. `text` is what a person reads."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(markup)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_up.everything(tmp_path_factory.mktemp("made-up") / "results")


@pytest.fixture(scope="module")
def markup(results: Path) -> str:
    return page(find(gather([results])), made=MADE)


@pytest.fixture(scope="module")
def written(markup: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(markup, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Browser:
    return Browser(tmp_path_factory.mktemp("browser"))


def test_it_is_one_file_that_loads_nothing(markup: str) -> None:
    read = Reader(markup)
    for tag, name, value in read.attributes:
        if name in ("src", "href", "xlink:href", "data", "action"):
            assert value.startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)", markup) and "@import" not in markup
    assert read.tags["script"] == 1 and not read.tags["link"]
    assert len(markup.encode()) < 1_000_000


def test_every_section_has_its_figures_and_tables(markup: str) -> None:
    read = Reader(markup)
    assert {section.name for section in SECTIONS} <= set(read.ids)
    for start in ("speedup-", "peers-", "search-", "heat-", "roofline-", "outcomes-", "budgets-"):
        assert any(each.startswith(start) for each in read.ids), start
    for table in ("champions", "peers", "searches", "heat-0", "pruned", "roofline", "failures", "budgets", "journals"):
        assert f"table-{table}" in read.ids, table
    assert read.tags["svg"] == read.tags["figure"] >= 8
    assert len(read.ids) == len(set(read.ids)), [name for name, count in Counter(read.ids).items() if count > 1]


def test_figures_take_their_colours_from_the_page(markup: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", markup, re.DOTALL))
    assert not re.search(r"(fill|stroke): *#", drawn), "a colour of its own does not follow dark and light"
    used, style = set(re.findall(r"var\((--[\w-]+)\)", drawn)), markup.partition("</style>")[0]
    for name in used - {"--font"}:
        # Light, dark by the system, dark by choice.
        assert style.count(f"{name}:") == 3, name
    for target in re.findall(r"url\(#([^)]+)\)", drawn) + re.findall(r'href="#([^"]+)"', drawn):
        assert f'id="{target}"' in drawn, target


def test_the_policy_allows_the_script_that_is_there_and_no_other(markup: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", markup, re.DOTALL)
    digest = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = [value for tag, name, value in Reader(markup).attributes if name == "content" and "script-src" in value]
    assert f"script-src '{digest}'" in policy and "default-src 'none'" in policy


def test_what_a_file_says_is_never_markup(tmp_path: Path) -> None:
    made_up.champions(tmp_path, hostile=True)
    made_up.journal(tmp_path, problem_text=HOSTILE, driver=HOSTILE, kernel_digest=HOSTILE)
    made_up.campaign(
        tmp_path, **{HOSTILE: {"not_measured": HOSTILE}, "ratio": {"ratio": 2.0, "interval": [1, HOSTILE]}}
    )
    evidence = gather([tmp_path])
    assert not evidence.unread
    read = Reader(page(find(evidence), made=HOSTILE))
    assert read.tags["script"] == 1 and not read.tags["img"]
    assert not [name for _, name, _ in read.attributes if name.startswith("on")]
    # It was shown: of the device, the environment, the certificate, the journal, the ledger, and in figures.
    assert read.text.count("<script>alert(1)</script>") > 10
    pulled = markdown(find(evidence), made=HOSTILE)
    outside = re.sub(r"`[^`\n]*`", "", pulled)
    # Of characters that could be markup, ours alone are left.
    assert set(re.findall(r"<[^>]*>?", outside)) <= {"<details>", "<summary>", "</summary>", "</details>"}
    assert "`" not in outside and "alert(1)" in pulled
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in pulled.splitlines() if line.startswith("|")]
    assert all(widths), widths


@pytest.mark.parametrize(("value", "other"), [(5e-324, 1.7e308), (1.7e308, 5e-324), (1.7e308, 1.7e308)])
def test_numbers_of_no_world_are_shown_in_no_figure(tmp_path: Path, value: float, other: float) -> None:
    number = made_up.number(
        value_ms=value,
        default_ms=other,
        ratio=other,
        ratio_interval=(value, other),
        interval_ms=(value, other),
        runner_up=None,
    )
    fake_champions.keep(tmp_path, fake_champions.champion_file(fake_champions.champion(FORWARD, number=number)))
    made_up.campaign(tmp_path, huge={"ratio": 10**400, "rival_ms": value, "ours_ms": other, "interval": [value, other]})
    path = made_up.journal(tmp_path)
    lines = path.read_text().splitlines()
    for place, line in enumerate(lines):
        lines[place] = re.sub(r'"times_ms":\[[^]]*\]', f'"times_ms":[{value if place % 2 else other}]', line)
    path.write_text("\n".join(lines) + "\n")
    found = find(gather([tmp_path]))
    assert not found.evidence.unread and found.champions[0].speedup is None and not found.convergence
    Reader(page(found, made=MADE))
    assert "`flash_fwd` (on h200)" in markdown(found, made=MADE)


def test_an_estimate_is_called_one_before_anything_else(tmp_path: Path) -> None:
    made_up.champions(tmp_path)
    (tmp_path / "best" / "h200" / "flash_fwd.json").unlink()
    found = find(gather([tmp_path]))
    assert "Nothing of ours on this page was measured" in Reader(page(found, made=MADE)).text
    assert "Nothing of ours here was measured" in markdown(found, made=MADE)


def test_the_tables_for_a_pull_request_say_the_same(results: Path) -> None:
    found = find(gather([results]))
    lines = markdown(found, made=MADE).splitlines()
    assert lines[0] == "## FlashTune report"
    rows = [line for line in lines if line.startswith(f"| `{FORWARD}` | `flash_fwd`")]
    assert any("1.25× (95 %: 1.22 to 1.28)" in row and "0.950×" in row for row in rows), rows
    assert any("not measured" in line for line in lines)
    for head, rule in itertools.pairwise(lines):
        if rule.startswith(("| ---", "|---")):
            assert head.count("|") == rule.count("|")


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("kernels", "search_spaces"):
        (tmp_path / part).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("form", ["html", "md"])
def test_an_empty_workspace_gives_a_report_that_says_what_is_missing(
    workspace: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", "out", "--format", form, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    jsonschema.validate(document, documents.json_schema("report"))
    assert document["champions"] == 0 and document["missing"]["champions"].startswith("flashtune tune ")
    content = (workspace / "out").read_text()
    text = Reader(content).text if form == "html" else content
    assert "flashtune tune flash_fwd --workload quickstart" in text and "no champion has been found" in text
    assert len(content.encode()) == document["bytes"]


def test_files_from_anywhere_need_no_workspace(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(
            [
                "report",
                "--out",
                "page.html",
                "--from",
                str(results / "best"),
                str(results / "campaign" / "campaign.json"),
            ]
        )
        == 0
    )
    assert "2 champions (1 measured, 1 not)" in capsys.readouterr().out
    assert main(["report", "--out", "page.html"]) == MachineError.exit_code


def test_what_cannot_be_made_is_said(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "--out", "x.pdf", "--format", "pdf"]) == UsageError.exit_code
    assert main(["report", "--out", "."]) == UsageError.exit_code
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert main(["report", "--out", "x.html"]) == MachineError.exit_code
    assert "flashtune[report]" in capsys.readouterr().err
    assert not list(workspace.glob("x.*"))
    assert main(["report", "--out", "x.md", "--format", "md"]) == 0


@needs_chromium
def test_a_browser_shows_every_figure_and_says_nothing(written: Path, markup: str, browser: Browser) -> None:
    found = browser.asked(
        written,
        """
        const box = (one) => one.getBoundingClientRect();
        const svgs = [...page.querySelectorAll('figure svg')];
        found.shown = svgs.filter((one) => box(one).width > 200 && box(one).height > 80).length;
        found.marks = page.querySelectorAll('.mark').length;
        found.wide = Math.max(page.documentElement.scrollWidth, page.body.scrollWidth);
        found.small = Math.min(...[...page.querySelectorAll('svg text')].map((one) => box(one).height));
        const ink = () => getComputedStyle(page.querySelector('figure svg text')).fill;
        const back = () => getComputedStyle(page.body).backgroundColor;
        found.light = ink() + back();
        page.querySelector('#theme-dark').click();
        found.dark = ink() + back();
        const heading = page.querySelectorAll('#table-failures th')[2];
        const first = () => page.querySelector('#table-failures').tBodies[0].rows[0].cells[2].textContent;
        heading.click(); found.least = first(); heading.click(); found.most = first();
        page.querySelector('.mark').dispatchEvent(new PointerEvent('pointerenter'));
        found.tip = page.querySelector('#tip').textContent;
        """,
    )
    figures = Reader(markup).tags["figure"]
    assert int(found["shown"]) == figures, found
    assert int(found["marks"]) > 100
    assert int(found["wide"]) <= 375, "a phone would have to scroll sideways"
    assert float(found["small"]) >= 8, "words in figures are too small on a phone"
    assert found["light"] != found["dark"], "figures and page must follow the choice of colours"
    assert int(found["least"]) < int(found["most"])
    assert "the default's speed" in found["tip"]


@needs_chromium
def test_without_a_script_all_tables_and_figures_are_there(written: Path, markup: str, browser: Browser) -> None:
    found = browser.asked(
        written,
        """
        found.script = page.querySelectorAll('.sortable, #tip').length;
        for (const tag of ['table', 'tr', 'svg', 'figure']) found[tag] = page.querySelectorAll(tag).length;
        found.words = page.querySelector('#table-champions').textContent;
        page.querySelector('#theme-dark').checked = true;
        found.dark = getComputedStyle(page.body).backgroundColor;
        page.querySelector('#theme-light').checked = true;
        found.light = getComputedStyle(page.body).backgroundColor;
        """,
        scripts=False,
    )
    assert found["script"] == "0", "the page's script ran"
    wanted = Reader(markup).tags
    for tag in ("table", "tr", "svg", "figure"):
        assert int(found[tag]) == wanted[tag] > 0
    assert FORWARD in found["words"]
    assert found["dark"] != found["light"], "colours are chosen without a script too"


@needs_chromium
def test_the_console_would_have_been_heard(tmp_path: Path, browser: Browser) -> None:
    loud = tmp_path / "loud.html"
    loud.write_text("<script>console.error('heard'); missing();</script>")
    with pytest.raises(AssertionError, match="heard"):
        browser.dom(loud)
