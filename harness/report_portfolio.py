"""A portfolio in the words that a person reads."""

from rich.text import Text

from harness.outcome import Mode
from harness.portfolio import Portfolio
from harness.report import plural, three_digits, wrapped


def portfolio_lines(found: Portfolio, mode: Mode) -> Text:
    """The fewest configs that serve all problems, and what they cost each."""
    text = Text()
    text.append("Portfolio", style="bold")
    how = "no fewer do" if found.exact else f"at most {three_digits(found.bound)} times as many as needed"
    word = " by estimate" if mode == "estimated" else ""
    count = sum(len(one.serves) for one in found.members)
    text.append(
        f"  {plural(len(found.members), 'config')} within {found.within * 100:g} % of the best on"
        f" {plural(count, 'problem')}{word} ({how})\n"
    )
    for one in found.members:
        text.append(wrapped(" ".join(f"{name}={value}" for name, value in one.config.items()), first="  "))
        for problem, ratio in one.serves.items():
            slower = "its best" if ratio <= 1 else f"at most {(ratio - 1) * 100:.1f} % behind its best"
            text.append(f"    {problem}: {slower}{word}\n")
    for problem in found.unserved:
        text.append(f"    {problem}: no champion\n", style="red")
    return text
