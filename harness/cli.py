"""The command line: options, one call a verb, and errors as exit codes.

Exit codes: 0 fine, 1 the tool found something, 2 usage, 3 environment, 70 a bug of ours, 130 interrupted (the journal is
valid). An error reads `error: ...`, a blank line, `hint: ...`; a traceback appears only with `--verbose` or for a bug.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from harness import __version__
from harness.errors import HarnessError, MachineError, UsageError

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Argparse with our voice: a usage error is an exception like any other."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs."""
    parser = _Parser(prog="flashtune", description="Find the fastest attention config that is proved right.")
    parser.add_argument("--version", action="version", version=f"flashtune {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB", parser_class=_Parser)

    tune = _verb(verbs, "tune", "search a kernel's space and keep a champion for each problem; run again to continue")
    tune.add_argument("kernel", metavar="KERNEL", help="stem of a file in kernels/ and search_spaces/")
    tune.add_argument("--workload", metavar="W", help="named problems (default: quickstart); NAME:TAG for a part")
    tune.add_argument(
        "--problem", metavar="P", action="append", help="a problem, e.g. 'b4 h32/8 s4096 d128 bf16 causal'"
    )
    tune.add_argument(
        "--target", metavar="T", help="device to tune for; estimated unless it is here (default without a GPU: h200)"
    )
    tune.add_argument(
        "--budget", metavar="N", default="24", help="trials per problem (24) or time per problem (90s, 10m)"
    )
    tune.add_argument(
        "--strategy", metavar="S", help="gp (default), forest, lfbo, tpe, genetic, local, random, exhaustive"
    )
    tune.add_argument("--seed", metavar="N", type=_count, default=0, help="same seed, same proposals (default: 0)")
    tune.add_argument("--jobs", metavar="N", type=_positive, help="child processes for compiling (default: all cores)")
    tune.add_argument("--runs", metavar="DIR", help="where journals are kept (default: results/runs)")
    tune.add_argument("--draft", action="store_true", help="keep champions as drafts that git ignores")
    tune.add_argument(
        "--fleet", metavar="F", help="tune on a Ray cluster: ray://HOST:PORT, HOST:PORT, or local; see docs/fleet.md"
    )
    tune.add_argument(
        "--storage", metavar="URL", help="with --fleet: postgresql://..., or grpc://HOST:PORT, for trials"
    )
    tune.add_argument("--no-progress", action="store_true", help="no live progress bar")

    space = _verb(verbs, "space", "the size of a kernel's space, and how many configs each rule removes")
    space.add_argument("kernel", metavar="KERNEL")
    space.add_argument("--problem", metavar="P", required=True)
    space.add_argument("--target", metavar="T", help="device (default: h200)")

    _add_provers(verbs)
    _add_campaign(verbs)
    _add_timers(verbs)
    doctor = _verb(verbs, "doctor", "what is on this machine, and whether a measurement here could be trusted")
    doctor.add_argument("--campaign", action="store_true", help="what a campaign would lack here")
    doctor.add_argument("--out", metavar="DIR", help="with --campaign: the folder that it would write to")

    show = _verb(verbs, "show", "champions; with --failed the failures of the journals by reason")
    show.add_argument("what", metavar="KERNEL|FILE", nargs="?", help="a kernel of this workspace, or a champion file")
    show.add_argument("--target", metavar="T", help="champions of this device only")
    show.add_argument("--failed", action="store_true", help="failures by reason instead of champions")
    show.add_argument("--runs", metavar="DIR", help="where journals are kept (default: results/runs)")
    _add_keepers(verbs)
    _add_report(verbs)
    return parser


def _add_report(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    page = _verb(verbs, "report", "everything that was found as one HTML page, or as tables for a pull request")
    page.add_argument("--out", metavar="FILE", required=True)
    page.add_argument("--format", metavar="F", default="html", help="html (default) or md")
    page.add_argument(
        "--from",
        dest="sources",
        metavar="WHAT",
        nargs="+",
        help="files or folders instead of this workspace's results/",
    )

    init = _verb(verbs, "init", "a new workspace: kernels, their search spaces, a place for results")
    init.add_argument("folder", metavar="DIR", help="a folder that is empty or does not exist yet")


def _add_keepers(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    verify = _verb(verbs, "verify", "prove champions of another version of the kernel again; exit 1 when one is struck")
    verify.add_argument("kernel", metavar="KERNEL", nargs="?")
    verify.add_argument("--all", action="store_true", help="also those that are proved of the kernel as it is")
    verify.add_argument("--seed", metavar="N", type=_count, default=0, help="same seed, same cases (default: 0)")
    verify.add_argument("--jobs", metavar="N", type=_positive, help="child processes (default: all cores)")

    lookup = _verb(verbs, "lookup", "which config a problem gets, whose it is, and which champions were passed over")
    lookup.add_argument("problem", metavar="PROBLEM", help="e.g. 'b4 h32/8 s4096 d128 bf16 causal'")
    lookup.add_argument("--kernel", metavar="K", help="a kernel (default: each that computes the pass)")
    lookup.add_argument("--device", metavar="D", help="model or architecture (default: what is here, else h200)")
    lookup.add_argument(
        "--mode", metavar="M", default="nearest", help="exact, bucket, nearest (default), default, require"
    )
    lookup.add_argument(
        "--deterministic", action="store_true", help="only champions that were seen to repeat their bits"
    )
    lookup.add_argument("--sibling", action="store_true", help="also champions of other models of the architecture")
    lookup.add_argument(
        "--time", action="store_true", help="also measure how long the answer takes when it is asked again"
    )

    table = _verb(
        verbs, "table", "write a kernel's champions on a device as a small table in Python that imports nothing"
    )
    table.add_argument("kernel", metavar="KERNEL")
    table.add_argument("--device", metavar="D", help="model (default: what is here, else h200)")
    table.add_argument("--out", metavar="FILE", required=True)

    export = _verb(verbs, "export", "champions in the form that another project reads, checked by its own code")
    export.add_argument("--to", metavar="TARGET", required=True, help="who reads them; see docs/exports.md")
    export.add_argument(
        "--out", metavar="DIR", required=True, help="a folder of its own; an unchanged export is replaced"
    )
    export.add_argument(
        "--from", dest="sources", metavar="PATH", nargs="+", help="champion files or folders (default: results/best)"
    )
    export.add_argument("--measured", action="store_true", help="leave out champions whose number is an estimate")
    export.add_argument("--no-check", action="store_true", help="do not let the consumer's own code read it")

    validate = _verb(verbs, "validate", "whether files are champion files; exit 1 when one is not")
    validate.add_argument("files", metavar="FILE", nargs="+")

    diff = _verb(verbs, "diff", "what two champion files do not share; exit 1 when there is anything")
    diff.add_argument("old", metavar="OLD")
    diff.add_argument("new", metavar="NEW")

    merge = _verb(verbs, "merge", "the champions of several files of one device and environment in one file")
    merge.add_argument("files", metavar="FILE", nargs="+")
    merge.add_argument("--out", metavar="FILE", required=True, help="where they are kept; what is there stays in it")


def _add_provers(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    fuzz = _verb(verbs, "fuzz", "search for a counterexample; shrink it; keep it in results/corpus")
    fuzz.add_argument("kernel", metavar="KERNEL", nargs="?", help="a kernel of this workspace")
    fuzz.add_argument("--impl", metavar="F", help="anybody's: package.module:function, or a stock adapter such as sdpa")
    fuzz.add_argument("--signature", metavar="S", help="how --impl is called: sdpa, flash, flex, ours")
    fuzz.add_argument("--supports", metavar="W", action="append", help="what --impl can do, e.g. 'fwd causal fp16 gqa'")
    fuzz.add_argument("--profile", metavar="P", help="pr, nightly, gpu, mutation, repro: stock time, cases and judges")
    fuzz.add_argument("--sanitize", metavar="T", help="on a GPU: memcheck, racecheck, initcheck or synccheck")
    fuzz.add_argument("--time", metavar="T", help="how long, e.g. 90s, 10m (default: 60s, or as the profile says)")
    fuzz.add_argument(
        "--corpus", metavar="DIR", help="where counterexamples are kept, and asked first (default: results)"
    )
    fuzz.add_argument("--cases", metavar="N", type=_positive, help="at most so many cases")
    fuzz.add_argument("--seed", metavar="N", type=_count, default=0, help="same seed, same cases (default: 0)")

    replay = _verb(
        verbs, "replay", "ask every judge about a counterexample again; or judge searches on recorded spaces"
    )
    replay.add_argument("what", metavar="FILE", nargs="?", help="a corpus file, or the id in its name")
    replay.add_argument("--spaces", metavar="DIR", help="judge searches: a folder of recorded spaces")
    replay.add_argument(
        "--strategies",
        metavar="S",
        default="default",
        help="default, ours, all (with Kernel Tuner's), or names: gp,tpe",
    )
    replay.add_argument(
        "--budget", metavar="N", type=_positive, default=200, help="trials of each search (default: 200)"
    )
    replay.add_argument("--seeds", metavar="N", type=_positive, default=20, help="searches of each (default: 20)")
    replay.add_argument("--noise", action="store_true", help="tell one of the recorded runs instead of their median")
    replay.add_argument("--warm", action="store_true", help="let ours know the same kernel's other spaces in DIR")
    replay.add_argument("--jobs", metavar="N", type=_positive, help="searches at a time (default: all cores)")

    mutants = _verb(verbs, "mutants", "measure the suite by planted bugs: who sees which, and how soon")
    mutants.add_argument("kernel", metavar="KERNEL")
    mutants.add_argument("--only", metavar="WORD", action="append", help="mutants with this in their name; repeatable")
    mutants.add_argument(
        "--cases", metavar="N", type=_positive, default=640, help="at most so many each (default: 640)"
    )
    mutants.add_argument("--seed", metavar="N", type=_count, default=0, help="same seed, same cases (default: 0)")
    mutants.add_argument("--jobs", metavar="N", type=_positive, default=2, help="mutants at a time (default: 2)")
    mutants.add_argument(
        "--compare", action="store_true", help="show them to the gate and to other projects' criteria too"
    )


def _add_timers(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    bench = _verb(verbs, "bench", "time champions and default in turns with peers; needs a GPU")
    bench.add_argument("kernel", metavar="KERNEL")
    bench.add_argument("--workload", metavar="W", help="named problems (default: quickstart)")
    bench.add_argument("--problem", metavar="P", action="append", help="a problem; repeatable")
    bench.add_argument(
        "--peers", metavar="A,B", help="who (default: all): default, sdpa:flash, fa3, flex, flex:tuned ..."
    )
    bench.add_argument("--seed", metavar="N", type=_count, default=0, help="same seed, same inputs (default: 0)")
    bench.add_argument("--jobs", metavar="N", type=_positive, help="compiling children (default: all cores but 2)")

    compare = _verb(verbs, "compare", "which problem became faster or slower; exit 1 when one became slower")
    compare.add_argument("old", metavar="OLD", help="a journal, a champion file, or a folder of champion files")
    compare.add_argument("new", metavar="NEW", help="the same, of a later run")


def _add_campaign(verbs: "argparse._SubParsersAction[_Parser]") -> None:
    campaign = _verb(verbs, "campaign", "all that is worth knowing of a new GPU, part by part; run again to go on")
    campaign.add_argument("--out", metavar="DIR", required=True, help="what was found, and what is done")
    campaign.add_argument("--minutes", metavar="N", type=_minutes, help="how long this run may take, e.g. 9.5")
    campaign.add_argument(
        "--only", metavar="STEP", action="append", help="truth, spaces, champions, beside, judging; repeatable"
    )
    campaign.add_argument("--keep", action="store_true", help="count what older versions of the judges measured")
    campaign.add_argument("--seed", metavar="N", type=_count, default=0, help="same seed, same questions (default: 0)")
    campaign.add_argument("--jobs", metavar="N", type=_positive, help="compiling children (default: all cores but 2)")
    campaign.add_argument("--answers", action="store_true", help="record the interpreter's answers; needs no GPU")
    campaign.add_argument("--target", metavar="T", help="with --answers: the device of the campaign (default: h200)")
    campaign.add_argument(
        "--adopt", action="store_true", help="keep its champions, spaces and counterexamples in this workspace"
    )
    campaign.add_argument("--draft", action="store_true", help="with --adopt: champions as drafts that git ignores")


def _minutes(text: str) -> float:
    """Minutes, more than 0."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"`{text}` is no number of minutes")
    return found


def _count(text: str) -> int:
    """A whole number of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number of at least 0")
    return int(text)


def _positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"`{text}` is no whole number of at least 1")
    return int(text)


def _verb(verbs: "argparse._SubParsersAction[_Parser]", name: str, what: str) -> argparse.ArgumentParser:
    verb = verbs.add_parser(name, help=what, description=what)
    verb.add_argument(
        "--workspace", metavar="DIR", help="folder with kernels/ and search_spaces/ (default: found upwards)"
    )
    verb.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    verb.add_argument("--quiet", action="store_true", help="no narration on stderr")
    verb.add_argument("--verbose", action="store_true", help="tracebacks with errors")
    return verb


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    verbose = "--verbose" in (sys.argv if argv is None else argv)
    try:
        return _dispatch(build_parser().parse_args(argv))
    except KeyboardInterrupt:
        print("\ninterrupted: every finished trial is in the journal; the same command continues", file=sys.stderr)
        return INTERRUPTED
    except HarnessError as error:
        if verbose:
            traceback.print_exc()
        _explain(error)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if verbose:
            traceback.print_exc()
        named = f" {error.filename}" if error.filename else ""
        hint = "every finished trial is in the journal; mend this and run the same command again"
        _explain(MachineError(f"the machine refused{named}: {error.strerror or error}", hint=hint))
        return MachineError.exit_code


# Verbs that have a module of their own.
_ALONE = {
    "bench": "benching", "compare": "comparing", "campaign": "campaigning", "export": "exporting", "report": "reporting",
    "init": "stock",
}  # fmt: skip


def _dispatch(options: argparse.Namespace) -> int:
    if options.verb == "doctor" and options.campaign:
        # It says what is missing, so it needs nothing that may be.
        from harness import readiness

        return readiness.run_doctor(options)
    if options.verb in _ALONE:
        return int(getattr(_load(_ALONE[options.verb]), f"run_{options.verb}")(options))
    commands = _load("commands")
    if options.verb == "replay" and bool(options.what) == bool(options.spaces):
        raise UsageError(
            "`replay` takes a counterexample, or `--spaces DIR` to judge searches"
            + (", not both" * bool(options.what)),
            hint="flashtune replay results/corpus/KERNEL/ID.json, or flashtune replay --spaces DIR --strategies ours",
        )
    if options.verb == "replay" and options.spaces:
        return int(_load("replaying").run_searches(options))
    if options.verb in ("fuzz", "replay", "mutants"):
        # Judges need torch, triton and hypothesis, which the other verbs do without.
        commands.require_packages("torch", "triton", "hypothesis")
        mutating, proving = _load("mutating"), _load("proving")
        provers = {"fuzz": proving.run_fuzz, "replay": proving.run_replay, "mutants": mutating.run_mutants}
        return int(provers[options.verb](options))
    if options.verb == "verify":
        commands.require_packages("torch", "triton", "hypothesis")
        return int(_load("renewing").run_verify(options))
    if options.verb in ("lookup", "table"):
        lookups = _load("lookups")
        return int((lookups.run_lookup if options.verb == "lookup" else lookups.run_table)(options))
    if options.verb in ("show", "validate", "diff", "merge"):
        showing = _load("showing")
        keepers = {
            "show": showing.run_show,
            "validate": showing.run_validate,
            "diff": showing.run_diff,
            "merge": showing.run_merge,
        }
        return int(keepers[options.verb](options))
    if options.verb == "tune" and (options.fleet or options.storage):
        return int(_load("fleeting").run_fleet_tune(options))
    verbs = {
        "tune": commands.run_tune,
        "space": commands.run_space,
        "doctor": _load("showing").run_doctor,
    }
    return int(verbs[options.verb](options))


def _load(name: str) -> Any:
    """A module of ours. What it needs and is not installed is said in words."""
    try:
        return importlib.import_module(f"harness.{name}")
    except ModuleNotFoundError as missing:
        raise MachineError(
            f"the package `{missing.name}` is not installed in {sys.prefix}",
            hint="run `make setup`; `flashtune doctor --campaign` lists all that is missing",
        ) from missing


def _explain(error: HarnessError) -> None:
    print(f"error: {error.message}", file=sys.stderr)
    cause = error.__cause__
    while cause is not None:
        print(
            f"  caused by: {type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else ''}", file=sys.stderr
        )
        cause = cause.__cause__
    if error.hint:
        print(f"\nhint: {error.hint}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
