"""What a campaign does, as values: its steps in the order of their worth, and the parts of each.

Names no machine: which problems fit, and what is missing, is found out where they are run. Refuses to do anything itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from harness.campaign import Part
from harness.problem import Pass, Problem, parse_problem
from harness.truth import questions
from harness.workload import TAGS, Workload

# The steps in their order, and the share of a run's time that each may take before the others had theirs.
SHARES: Mapping[str, float] = {"truth": 0.45, "spaces": 0.25, "champions": 0.15, "beside": 0.1, "judging": 0.05}

# Tunables that refine a config; the others decide its tiles and how it is pipelined.
_REFINING = ("groups_together", "programs_per_sm", "flatten", "maxnreg", "v_load", "cache_hints")
_DQ = ("dq_block_m", "dq_block_n", "dq_warps", "dq_stages", "dq_load")
_DKDV = ("dkdv_block_m", "dkdv_block_n", "dkdv_warps", "dkdv_stages", "dkdv_load")

# Measured in full, if time allows, by kernel, problem, and groups of tunables: of a space all configs that have the default's
# values in some group (all configs, if there is no group). A model's training, forward and backward, where each of the two
# launches is tuned beside the default of the other; GPT-2 medium as in the FlashAttention paper; a token of decoding.
SPACES: tuple[tuple[str, str, tuple[tuple[str, ...], ...]], ...] = (
    ("flash_fwd", "b2 h32/8 s8192 d128 bf16 causal fwd", (_REFINING,)),
    ("flash_decode", "b8 h32/8 q1 k8192 d128 bf16 fwd", ()),
    ("flash_bwd", "b2 h32/8 s4096 d128 bf16 causal bwd", (_DQ, _DKDV)),
    ("flash_fwd", "b64 h16 s1024 d64 fp16 fwd", (_REFINING,)),
)

# The kernel for a token or a few after many, and what is asked of it: Llama 3.1 8B and 70B, alone and in a batch.
DECODER = "flash_decode"
DECODING = (
    "b8 h32/8 q1 k8192 d128 bf16 fwd", "b1 h32/8 q1 k32768 d128 bf16 fwd", "b64 h32/8 q1 k4096 d128 bf16 fwd",
    "b1 h64/8 q1 k131072 d128 bf16 fwd",
)  # fmt: skip
# Compared beside the sweep: GPT-2 medium as the FlashAttention paper compares it, and a model's training.
PAPER = "b64 h16 s1024 d64 fp16"
TRAINING = "b2 h32/8 s8192 d128 bf16 causal"

# The sweep of the FlashAttention papers: hidden size 2048, a constant number of tokens.
TOKENS = 16384
HIDDEN = 2048
SWEEP_LENGTHS = (4096, 16384, 1024, 8192, 2048, 512)
SWEEP_DIMS = (128, 64, 256)
# The problem of the sweep for whose head dim and mask a champion is sought, which the other lengths then share.
ANCHOR_LENGTH = 4096

# PyTorch's FlexAttention as a subject of our own search, by pass, and its name as a rival then.
FLEX: Mapping[Pass, str] = {"fwd": "flex_attention", "bwd": "flex_attention_bwd"}
TUNED_FLEX = "flex:tuned"
OURS = "flashtune"

# Whom our kernels are compared with, and the headings of a table; a "default" is ours beside a champion of ours.
RIVAL_NAMES: Mapping[str, str] = {
    "default": "default", "sdpa:flash": "flash", "sdpa:cudnn": "cudnn", "sdpa:efficient": "memeff", "sdpa:math": "math",
    "fa3": "fa3", "flex": "flex", TUNED_FLEX: "tuned",
}  # fmt: skip
# Configs beside the default that each question is asked of.
MORE_CONFIGS: Mapping[Pass, int] = {"fwd": 2, "bwd": 1}
A_A_PROBLEMS = (
    "b2 h32/8 s4096 d128 bf16 causal fwd", "b64 h16 s1024 d64 fp16 fwd", "b1 h16 s512 d64 fp16 fwd",
    "b2 h32/8 s4096 d128 bf16 causal bwd",
)  # fmt: skip
A_A_RUNS = 3
FUZZ_S = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A kernel of the workspace: the pass it computes, the fields of a problem beyond plain attention that it takes, the digest
    of all that its results depend on, as in `Part.of`, and whose it is: others' are tuned to be compared with, and no more."""

    stem: str
    pass_: Pass
    of: str
    variants: frozenset[str] = frozenset()
    family: str = OURS


def plan(subjects: Sequence[Subject], workloads: Sequence[Workload], *, device_of: str) -> list[Part]:
    """All parts in order. The first subject of a pass is the one that is tuned and compared for it, but for decoding; `device_of`
    is the digest of what numbers of the device alone depend on."""
    first: dict[Pass, Subject] = {}
    ours = [subject for subject in subjects if subject.family == OURS]
    for subject in ours:
        first.setdefault(subject.pass_, subject)
    known = {subject.stem: subject for subject in ours}
    flex = {pass_: found for pass_, stem in FLEX.items() for found in subjects if found.stem == stem}
    return [
        *_truth(ours, device_of),
        *_spaces(known),
        *_champions(known, first, workloads),
        *_beside(known, first),
        *_traffic(known, first),
        *_beside_tuned(known, first, flex),
        *_judging(known, first),
    ]


def _truth(subjects: Sequence[Subject], device_of: str) -> Iterator[Part]:
    yield Part(step="truth", name="truth/ceilings", what={"do": "ceilings"}, least_s=15, most_s=90, of=device_of)
    asked = [
        [(subject, problem, recipe) for problem, recipe in questions(subject.pass_)
         if subject.variants.issuperset(parse_problem(problem).variants)]
        for subject in subjects
    ]  # fmt: skip
    for subject, problem, recipe in _in_turns(asked):
        what = {
            "do": "question", "kernel": subject.stem, "problem": str(parse_problem(problem)), "recipe": recipe,
            "more": MORE_CONFIGS[subject.pass_],
        }  # fmt: skip
        name = f"truth/{subject.stem}/{what['problem']} [{recipe}]"
        yield Part(step="truth", name=name, what=what, least_s=20, most_s=240, of=subject.of)
    for do, least, most in (("fuzz", FUZZ_S + 30, 240), ("memcheck", 90, 300)):
        for subject in subjects:
            what = {"do": do, "kernel": subject.stem, "seconds": FUZZ_S}
            name = f"truth/{do} {subject.stem}"
            yield Part(step="truth", name=name, what=what, least_s=least, most_s=most, of=subject.of)


def _spaces(known: Mapping[str, Subject]) -> Iterator[Part]:
    for stem, problem, groups in SPACES:
        if stem in known:
            what = {"do": "space", "kernel": stem, "problem": problem, "groups": [list(group) for group in groups]}
            yield Part(step="spaces", name=f"spaces/{stem}/{problem}", what=what, least_s=45, of=known[stem].of)


def _decoding() -> list[Problem]:
    return [parse_problem(text) for text in DECODING]


def _subject_for(problem: Problem, known: Mapping[str, Subject], first: Mapping[Pass, Subject]) -> Subject | None:
    """The kernel that is tuned and compared for a problem, if there is one."""
    return known.get(DECODER) if problem in _decoding() else first.get(problem.pass_)


def _champions(
    known: Mapping[str, Subject], first: Mapping[Pass, Subject], workloads: Sequence[Workload]
) -> Iterator[Part]:
    measured = [parse_problem(problem) for _, problem, _ in SPACES]
    wanted = [*measured, *_trained(), *_in_turns([_decoding(), anchors(), _of_workloads(workloads)])]
    for problem in dict.fromkeys(wanted):
        subject = _subject_for(problem, known, first)
        if subject is not None:
            what = {"do": "champion", "kernel": subject.stem, "problem": str(problem)}
            name = champion_name(subject.stem, problem)
            yield Part(step="champions", name=name, what=what, least_s=75, most_s=300, of=subject.of)


def champion_name(stem: str, problem: Problem) -> str:
    """The name of the part that gives the champion of a problem."""
    return f"champions/{stem}/{problem}"


def _of_workloads(workloads: Sequence[Workload]) -> list[Problem]:
    """One problem of every workload after the other: what is asked at once, then training in both passes, then what is long."""
    columns = []
    for workload in workloads:
        tags = workload.tags or ("training",) * len(workload.problems)
        ordered = sorted(zip(tags, workload.problems, strict=True), key=lambda pair: TAGS.index(pair[0]))
        passes: Mapping[str, tuple[Pass, ...]] = {"training": ("fwd", "bwd")}
        columns.append([problem.replace(pass_=one) for tag, problem in ordered for one in passes.get(tag, ("fwd",))])
    return list(_in_turns(columns))


def sweep() -> list[Problem]:
    """The standard sweep, the most telling problems first."""
    return [
        _sweep_problem(head_dim, length, causal, pass_)
        for length in SWEEP_LENGTHS
        for head_dim in SWEEP_DIMS
        for causal in (True, False)
        for pass_ in _PASSES
    ]


_PASSES: tuple[Pass, ...] = ("fwd", "bwd")


def anchors() -> list[Problem]:
    """The problems of the sweep whose champions stand for all lengths."""
    return [problem for problem in sweep() if problem.q_len == ANCHOR_LENGTH]


def anchor_of(problem: Problem) -> Problem:
    """The problem whose champion stands for `problem`: the anchor of one of the sweep, else itself."""
    return (
        _sweep_problem(problem.head_dim, ANCHOR_LENGTH, problem.causal, problem.pass_)
        if problem in sweep()
        else problem
    )


def _sweep_problem(head_dim: int, length: int, causal: bool, pass_: Pass) -> Problem:
    heads = HIDDEN // head_dim
    return Problem(
        batch=TOKENS // length, q_heads=heads, kv_heads=heads, q_len=length, kv_len=length, head_dim=head_dim,
        v_head_dim=head_dim, dtype="bf16", causal=causal, pass_=pass_,
    )  # fmt: skip


def compared() -> list[Problem]:
    """What stands beside others, the most telling problems first; those of the sweep last."""
    return [*_trained(), *_decoding(), *sweep()]


def _trained() -> list[Problem]:
    return [parse_problem(f"{text} {pass_}") for text in (PAPER, TRAINING) for pass_ in _PASSES]


def _beside(known: Mapping[str, Subject], first: Mapping[Pass, Subject]) -> Iterator[Part]:
    """FlexAttention is compiled for every shape, which takes longest: it comes last."""
    quick = tuple(name for name in RIVAL_NAMES if name not in ("flex", TUNED_FLEX))
    for rivals, least in ((quick, 40), (("flex",), 75)):
        for problem in compared():
            subject = _subject_for(problem, known, first)
            if subject is None:
                continue
            what = {"do": "beside", "kernel": subject.stem, "problem": str(problem), "rivals": list(rivals)}
            name = f"beside/{problem}" + (" flex" if "flex" in rivals else "")
            yield Part(step="beside", name=name, what=what, least_s=least, most_s=240, of=subject.of)


def _beside_tuned(
    known: Mapping[str, Subject], first: Mapping[Pass, Subject], flex: Mapping[Pass, Subject]
) -> Iterator[Part]:
    """FlexAttention, tuned by our own search for what stands for the most, and then compared: a pair of parts each."""
    for problem in _flex_tuned():
        subject, tuned = _subject_for(problem, known, first), flex.get(problem.pass_)
        if subject is None or tuned is None:
            continue
        what = {"do": "champion", "kernel": tuned.stem, "problem": str(problem)}
        name = champion_name(tuned.stem, problem)
        yield Part(step="beside", name=name, what=what, least_s=150, most_s=420, of=tuned.of)
        for one in [other for other in compared() if anchor_of(other) == problem] or [problem]:
            asked = {"do": "beside", "kernel": subject.stem, "problem": str(one), "rivals": [TUNED_FLEX]}
            yield Part(
                step="beside", name=f"beside/{one} {TUNED_FLEX}", what=asked, least_s=75, most_s=240,
                of=_of_both(subject.of, tuned.of),
            )  # fmt: skip


def _of_both(one: str, other: str) -> str:
    """The digest of what depends on two kernels."""
    kernels, judges = zip(*(each.partition(":")[::2] for each in (one, other)), strict=True)
    return f"{'+'.join(kernels)}:{judges[0]}"


def _traffic(known: Mapping[str, Subject], first: Mapping[Pass, Subject]) -> Iterator[Part]:
    """What GPT-2 medium moves, by standard attention and by ours."""
    for pass_ in _PASSES:
        problem = parse_problem(f"{PAPER} {pass_}")
        subject = _subject_for(problem, known, first)
        if subject is not None:
            what = {"do": "traffic", "kernel": subject.stem, "problem": str(problem)}
            yield Part(step="beside", name=traffic_name(problem), what=what, least_s=60, most_s=240, of=subject.of)


def traffic_name(problem: Problem) -> str:
    """The name of the part that reads a problem's traffic."""
    return f"beside/traffic {problem}"


def _flex_tuned() -> list[Problem]:
    """What FlexAttention is tuned for: GPT-2 medium and a model's training, then the anchors of the sweep."""
    return list(dict.fromkeys([*_trained(), *anchors()]))


def _judging(known: Mapping[str, Subject], first: Mapping[Pass, Subject]) -> Iterator[Part]:
    for text in A_A_PROBLEMS:
        subject = first.get(parse_problem(text).pass_)
        if subject is not None:
            what = {"do": "same", "kernel": subject.stem, "problem": text, "runs": A_A_RUNS}
            yield Part(step="judging", name=f"judging/same {text}", what=what, least_s=45, most_s=120, of=subject.of)
    for stem, text, groups in SPACES:
        if stem in known:
            what = {"do": "estimate", "kernel": stem, "problem": text, "groups": [list(group) for group in groups]}
            name = f"judging/estimate {stem}/{text}"
            yield Part(step="judging", name=name, what=what, least_s=30, most_s=120, of=known[stem].of)


def _in_turns(columns: Sequence[Sequence[Any]]) -> Iterator[Any]:
    return (one for one in chain.from_iterable(zip_longest(*columns)) if one is not None)
