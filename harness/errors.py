"""Every error that FlashTune raises on purpose. No other module defines exceptions.

An error is written for a reader at two in the morning: what was asked, what was found, what to do. Expected failures of a
candidate (it does not compile, it is wrong) are not errors: they are outcomes, see `harness.outcome`.
"""

from collections.abc import Sequence
from difflib import get_close_matches


class HarnessError(Exception):
    """A refusal with an explanation and an exit code.

    `message` says what was asked and what was found, `hint` what to do about it.
    """

    exit_code = 3

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n\nhint: {self.hint}" if self.hint else self.message


class UsageError(HarnessError):
    """The command or a value in it cannot be understood. Common causes: a typo, a missing option."""

    exit_code = 2


class ProblemError(UsageError):
    """The attention problem is malformed or impossible. Common cause: query heads no multiple of key/value heads."""


class RefusedError(HarnessError):
    """A subject was asked a problem that it says it cannot do. Common cause: a property asks a relative of the problem."""


class SubjectError(HarnessError):
    """An attention under test raised something half-way through a question: a finding about it, not a fault of ours."""


class MachineError(HarnessError):
    """The machine cannot do what was asked. Common causes: no GPU, no torch, a folder that cannot be written."""


class WorkspaceError(MachineError):
    """The workspace is missing, incomplete, or shadowed by another package of the same name."""


class ChampionError(WorkspaceError):
    """A champion file cannot be used: damaged, of another version, of another device, or not one at all."""


class MissError(HarnessError):
    """No champion answers a lookup that requires one. Common causes: nothing like it was tuned, or what was is stale."""

    exit_code = 1


class ExportError(HarnessError):
    """A consumer's own code does not take what an export made for it. Common cause: another version of the consumer."""

    exit_code = 1


class JournalError(MachineError):
    """A journal cannot be used: not ours, of another device, damaged before its last line, or in use."""


class OutOfTimeError(HarnessError):
    """The time that was given ended before what was asked. Nothing is wrong: what was finished before is kept."""


class BugError(HarnessError):
    """FlashTune broke one of its own invariants."""

    exit_code = 70


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """Return a hint that names the closest of `known`, or all of them if none is close."""
    close = get_close_matches(name, known, n=1)
    if close:
        return f"did you mean `{close[0]}`?"
    return "known: " + ", ".join(known) if known else "there are none"


def first_line(error: BaseException) -> str:
    """The type of what was raised, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
