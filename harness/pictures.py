"""Figures as SVG that follows the page: static, without a script, every colour a variable of the page's style.

matplotlib draws them with stand-in colours, which are exchanged for CSS variables afterwards; so one figure serves dark and
light. Every mark carries its numbers in words as an SVG title, which a pointer shows and a screen reader reads. Refuses to
interpret text from a file: matplotlib's mathematics is off. Needs the extra `report`.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"
_WIDTH_IN = 4.6
# Stand-ins: colours that nothing else has, by the name of the variable that takes their place.
_NAMES = (
    "ink", "muted", "grid", "paper", "time", "estimate", "default", "fail", "roof",
    "s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7",
    "h0", "h1", "h2", "h3", "h4", "h5", "h6", "h7", "h8", "hi0", "hi1", "hi2", "hi3", "hi4", "hi5", "hi6", "hi7", "hi8",
)  # fmt: skip
COLOUR = {name: f"#01{place:02x}fe" for place, name in enumerate(_NAMES)}
STEPS = 9
_STYLE: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "flashtune", "text.parse_math": False,
    "font.size": 8.5, "font.family": ["DejaVu Sans"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": COLOUR["muted"], "axes.labelcolor": COLOUR["muted"],
    "axes.grid": True, "axes.axisbelow": True, "grid.color": COLOUR["grid"], "grid.linewidth": 0.6, "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["muted"], "ytick.color": COLOUR["muted"], "xtick.labelsize": 8, "ytick.labelsize": 8,
    "axes.labelsize": 8.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6, "axes.unicode_minus": False,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure: `svg` is markup, everything in it escaped; `title` and `caption` are plain text; `name` is its anchor."""

    name: str
    title: str
    caption: str
    svg: str


@dataclass(slots=True)
class Canvas:
    """Axes to draw on, and the words of each mark."""

    axes: Axes
    tips: dict[str, str] = field(default_factory=dict)

    def tip(self, text: str) -> str:
        """A name for a mark, whose words are `text`: give it as `gid`."""
        name = f"tip{len(self.tips)}"
        self.tips[name] = text
        return name


def draw(name: str, title: str, caption: str, paint: Callable[[Canvas], None], *, height_in: float = 2.9) -> Picture:
    """A figure that `paint` draws; the title is also its name for who cannot see it."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
        figure.patch.set_alpha(0)
        canvas = Canvas(figure.add_subplot())
        canvas.axes.patch.set_alpha(0)
        paint(canvas)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = _restyled(drawn.getvalue(), name, title, canvas.tips)
    return Picture(name=name, title=title, caption=caption, svg=svg)


def mark_style(kind: str, role: str = "") -> dict[str, Any]:
    """How a number of a kind is drawn."""
    colour = COLOUR["default"] if role == "default" else COLOUR["time" if kind != "estimated" else "estimate"]
    if kind != "estimated":
        return {"marker": "o", "color": colour, "markersize": 5.5}
    return {
        "marker": "s",
        "markerfacecolor": "none",
        "markeredgecolor": colour,
        "markeredgewidth": 1.4,
        "markersize": 5.5,
    }


def anchor(text: str) -> str:
    return "".join(each if each.isascii() and each.isalnum() else "-" for each in text)


def log_axis(axis: Any, *, tick: Callable[[float], str], low: float, high: float) -> None:
    """Labels in plain numbers for a logarithmic axis that shows `low` to `high`; matplotlib's own are mathematics."""
    decades = high / low if low > 0 else 1.0
    subs: tuple[float, ...] = (1.0,) if decades > 300 else (1.0, 3.0) if decades > 20 else (1.0, 2.0, 5.0)
    if decades <= 4:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: tick(float(value))))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(which="minor", length=0)


def whole_axis(axis: Any) -> None:
    """Whole numbers only."""
    axis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def rows_axis(axes: Axes, count: int) -> None:
    """Rows from the top, without a scale of their own."""
    axes.set_ylim(count - 0.35, -0.75)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def row_label(axes: Axes, row: float, text: str, *, right: str = "") -> None:
    """The words of a row, above what is drawn in it: a column of its own would take a phone's whole width."""
    # Lines of the axes pass behind words.
    box = {"facecolor": COLOUR["paper"], "edgecolor": "none", "pad": 0.6}
    axes.text(0, row - 0.36, text, transform=axes.get_yaxis_transform(), ha="left", va="center", fontsize=8, bbox=box)
    if right:
        axes.text(
            1, row - 0.36, right, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8,
            color=COLOUR["muted"], bbox=box,
        )  # fmt: skip


def series(place: int) -> str:
    """The colour of one of several equal things."""
    return COLOUR[f"s{place % 8}"]


def cut(text: str, limit: int = 46) -> str:
    """Text that fits a figure's width."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


# ---------------------------------------------------------------------------------------------------------------------
# From matplotlib's document to a piece of a page
# ---------------------------------------------------------------------------------------------------------------------

_REFERENCE = re.compile(r"url\(#([^)]+)\)")
# As older and newer matplotlibs write it.
_FONT = re.compile(r"(font: [^;]*?\d[\d.]*px )[^;]*|(font-family: )[^;]*")
_BACK = {value: f"var(--{name})" for name, value in COLOUR.items()}


def _restyled(svg: bytes, name: str, title: str, tips: dict[str, str]) -> str:
    """The drawing as an element of a page: colours are variables, ids its own, marks have titles."""
    root = ElementTree.fromstring(svg)
    _, _, width, height = root.get("viewBox", "0 0 1 1").split()
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": title, "class": "figure"}
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        _restyle(element, name, tips)
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _XLINK)
    return (
        ElementTree.tostring(root, encoding="unicode")
        .replace(f' xmlns="{_SVG}"', "")
        .replace(f' xmlns:xlink="{_XLINK}"', "")
    )


def _restyle(element: ElementTree.Element, name: str, tips: dict[str, str]) -> None:
    given = element.attrib.pop("id", "")
    if given in tips:
        words = ElementTree.Element(f"{{{_SVG}}}title")
        words.text = tips[given]
        element.insert(0, words)
        element.set("class", "mark")
    elif given and element.tag in (f"{{{_SVG}}}clipPath", f"{{{_SVG}}}path"):
        # Only what is referred to needs a name, which no other figure of the page may have.
        element.set("id", f"{name}-{given}")
    target = element.attrib.pop(f"{{{_XLINK}}}href", "").removeprefix("#")
    if target:
        element.set("href", f"#{name}-{target}")
    if "clip-path" in element.attrib:
        element.set("clip-path", _REFERENCE.sub(rf"url(#{name}-\1)", element.attrib["clip-path"]))
    style = element.get("style")
    if style:
        for old, new in _BACK.items():
            style = style.replace(old, new)
        element.set("style", _FONT.sub(lambda found: f"{found[1] or found[2]}var(--font)", style))


def heat(share: float) -> tuple[str, str]:
    """The colour of a cell, from best (0) to worst (1), and of the ink on it."""
    step = min(STEPS - 1, max(0, round(share * (STEPS - 1))))
    return COLOUR[f"h{step}"], COLOUR[f"hi{step}"]


def positive(values: Sequence[float | None]) -> list[float]:
    """Those that are there."""
    return [one for one in values if one is not None and one > 0]
