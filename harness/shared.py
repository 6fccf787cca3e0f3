"""A journal that a fleet shares: its trials live in optuna's storage, on PostgreSQL or behind optuna's gRPC proxy.

One study a problem, one trial a candidate: claimed before it is tried, finished with its record. The file beside it stays the
append-only record of this machine, and is brought up to date from the storage, and the storage from it, when it is opened.
Refuses a study of another device, kernel or toolchain, and one that another tune is working on.
"""

import contextlib
import hashlib
import importlib.util
import json
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from harness.errors import JournalError, MachineError, UsageError
from harness.outcome import RECORDS, Record, value_ms
from harness.space import Space
from harness.store import Journal, key_of, open_journal

# A claim is renewed so often, and given up for lost after so long without, in seconds.
HEARTBEAT_S = 10
GRACE_S = 30
# How a storage of optuna's may be named, and what that needs beside optuna.
_NEEDS = {"postgresql": ("sqlalchemy", "psycopg"), "grpc": ("grpc",)}
_HINT = "pip install 'flashtune[fleet]'"


@dataclass(slots=True)
class SharedJournal(Journal):
    """A journal whose trials are in `studies` too, by problem. What it appends is in the storage before it is in the file."""

    studies: Mapping[str, optuna.Study] = field(default_factory=dict)
    spaces: Mapping[str, Space] = field(default_factory=dict)
    shown: str = ""
    owner: str = ""
    storage: Any = None
    # Trials that are claimed and not finished.
    _claimed: dict[Any, optuna.Trial] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)
    _heart: threading.Thread | None = None

    def begin(self, problem: str, config: Mapping[str, Any]) -> None:
        """Claim a candidate: from here on it is somebody's, until it is finished or its heartbeat stops."""
        key = problem, frozenset(config.items())
        if key in self._claimed:
            return
        study = self.studies[problem]
        with _reaching(self.shown), _no_word_of_experiments():
            study.enqueue_trial(dict(config), user_attrs={"identity": digest(self.identity), "owner": self.owner})
            trial = study.ask(_distributions(self.spaces[problem]))
            if trial.params != dict(config):
                raise JournalError(
                    f"another tune is working on the study `{study.study_name}` in {self.shown}",
                    hint="one tune at a time searches a problem on a model of device; its workers may be many",
                )
            self._claimed[key] = trial
            _beat(study, trial)

    def append(self, record: Record) -> None:
        """Finish the candidate's trial with its record, then write the file. Raises `JournalError`, and nothing is written."""
        key = record.problem, frozenset(record.config.items())
        trial = self._claimed.get(key) if record.role == "screen" else None
        with _reaching(self.shown):
            self._publish(record, trial)
        if trial is not None:
            del self._claimed[key]
        Journal.append(self, record)

    def close(self) -> None:
        """Let go of what was claimed and not finished, so that the next tune need not wait for it to go stale."""
        self._over.set()
        if self._heart is not None:
            self._heart.join()
        with contextlib.suppress(JournalError), _reaching(self.shown):
            for (problem, _), trial in self._claimed.items():
                self.studies[problem].tell(trial, state=TrialState.FAIL)
        self._claimed.clear()
        Journal.close(self)
        _let_go(self.storage)

    def _publish(self, record: Record, trial: optuna.Trial | None) -> None:
        study, text = self.studies[record.problem], RECORDS.dump_json(record).decode()
        if record.role != "screen":
            study.set_user_attr(_attribute(record), {"identity": digest(self.identity), "record": text})
        elif trial is None:
            attributes = {"identity": digest(self.identity), "owner": self.owner, "record": text}
            added = optuna.create_trial(
                params=dict(record.config), distributions=_distributions(self.spaces[record.problem]), user_attrs=attributes,
                state=_state(record), value=value_ms(record.outcome),
            )  # fmt: skip
            study.add_trial(added)
        else:
            trial.set_user_attr("record", text)
            study.tell(trial, value_ms(record.outcome), state=_state(record))

    def recover(self, problem: str, study: optuna.Study, grace_s: float) -> Iterator[Record]:
        """The records of a study. What a tune that is no more had claimed is given up, so that it can be claimed again."""
        deadline = time.monotonic() + grace_s
        while True:
            with _no_word_of_experiments():
                optuna.storages.fail_stale_trials(study)
            held = [one for one in study.get_trials(deepcopy=False) if one.state == TrialState.RUNNING]
            for trial in held:
                # Of the record's two steps only the first was made, or the claim is of an earlier tune of this very journal,
                # which is no more: its file is ours.
                if "record" in trial.user_attrs:
                    record = RECORDS.validate_json(trial.user_attrs["record"])
                    study.tell(trial.number, value_ms(record.outcome), state=_state(record))
                elif trial.user_attrs.get("owner") == self.owner:
                    study.tell(trial.number, state=TrialState.FAIL)
            others = [
                one for one in held if one.user_attrs.get("owner") != self.owner and "record" not in one.user_attrs
            ]
            if not others:
                break
            if time.monotonic() > deadline:
                raise JournalError(
                    f"another tune is working on the study `{study.study_name}` in {self.shown}",
                    hint="wait for it; where no tune is, an unfinished trial has no heartbeat (behind a gRPC proxy none has): "
                    "open PostgreSQL itself, where such trials go stale",
                )
            time.sleep(0.5)
        while any(one.state == TrialState.WAITING for one in study.get_trials(deepcopy=False)):
            # Asked for by a tune that ended before it could claim it.
            with _no_word_of_experiments():
                study.tell(study.ask(_distributions(self.spaces[problem])), state=TrialState.FAIL)
        for trial in study.get_trials(deepcopy=False):
            if "record" in trial.user_attrs:
                yield self._own(study, trial.user_attrs)
        for name, kept in sorted(study.user_attrs.items()):
            if name.startswith("record "):
                yield self._own(study, kept)

    def _own(self, study: optuna.Study, attributes: Mapping[str, Any]) -> Record:
        if attributes.get("identity") != digest(self.identity):
            raise JournalError(
                f"the study `{study.study_name}` in {self.shown} has a trial of another device, kernel or toolchain",
                hint="nothing merges these; it was written by something else than `flashtune tune --fleet`",
            )
        return RECORDS.validate_json(attributes["record"])

    def live(self, every_s: float) -> None:
        """Renew all claims every so many seconds, until it is closed."""
        self._heart = threading.Thread(target=self._beat, args=(every_s,), daemon=True)
        self._heart.start()

    def _beat(self, every_s: float) -> None:
        while not self._over.wait(every_s):
            for (problem, _), trial in list(self._claimed.items()):
                with contextlib.suppress(JournalError), _reaching(self.shown):
                    _beat(self.studies[problem], trial)
        self.storage.remove_session()


def open_shared_journal(
    path: Path,
    identity: Mapping[str, Any],
    spaces: Mapping[str, Space],
    url: str,
    *,
    heartbeat_s: int = HEARTBEAT_S,
    grace_s: int = GRACE_S,
) -> SharedJournal:
    """Open the journal at `path` and the studies of these problems in the storage at `url`, and merge what they hold.

    Raises `JournalError` for another run's, `UsageError` for an address that is none, `MachineError` where nothing answers.
    """
    storage = open_storage(url, heartbeat_s=heartbeat_s, grace_s=grace_s)
    try:
        local = open_journal(path, identity)
    except BaseException:
        _let_go(storage)
        raise
    try:
        with _reaching(shown_url(url)):
            studies = {problem: _open_study(storage, f"{path.stem} {problem}", identity, problem) for problem in spaces}
            shared = SharedJournal(
                path=local.path, identity=local.identity, records=local.records, torn=local.torn, _file=local._file,
                studies=studies, spaces=dict(spaces), shown=shown_url(url), owner=_owner(path), storage=storage,
            )  # fmt: skip
            _merge(shared, grace_s + heartbeat_s)
    except BaseException:
        local.close()
        _let_go(storage)
        raise
    if hasattr(storage, "record_heartbeat"):
        shared.live(heartbeat_s)
    return shared


def _merge(shared: SharedJournal, grace_s: float) -> None:
    before = list(shared.records)
    known = {(key_of(one), one.attempt) for one in before}
    there = set()
    for problem, study in shared.studies.items():
        for record in shared.recover(problem, study, grace_s):
            key = key_of(record), record.attempt
            there.add(key)
            if key not in known:
                known.add(key)
                Journal.append(shared, record)
    for record in before:
        if record.problem in shared.studies and (key_of(record), record.attempt) not in there:
            shared._publish(record, None)


def open_storage(url: str, *, heartbeat_s: int = HEARTBEAT_S, grace_s: int = GRACE_S) -> Any:
    """Optuna's storage at `postgresql://USER@HOST:PORT/NAME` or `grpc://HOST:PORT`. Raises `UsageError` or `MachineError`."""
    scheme, _, rest = url.partition("://")
    if scheme not in _NEEDS or not rest:
        raise UsageError(
            f"`{shown_url(url)}` is no storage",
            hint="write postgresql://USER@HOST:PORT/NAME, or grpc://HOST:PORT of optuna's proxy",
        )
    for package in _NEEDS[scheme]:
        if importlib.util.find_spec(package) is None:
            raise MachineError(f"the storage {scheme}:// needs the package `{package}`", hint=_HINT)
    if scheme == "grpc":
        host, _, port = rest.rstrip("/").rpartition(":")
        if not host or not port.isdigit():
            raise UsageError(f"`{url}` is no address of a proxy", hint="write grpc://HOST:PORT")
        with _reaching(url), _no_word_of_experiments():
            proxy = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
            proxy.wait_server_ready(timeout=10)
            return proxy
    with _reaching(shown_url(url)), _no_word_of_experiments():
        return optuna.storages.RDBStorage(
            f"postgresql+psycopg://{rest}", engine_kwargs={"pool_pre_ping": True}, heartbeat_interval=heartbeat_s,
            grace_period=grace_s,
        )  # fmt: skip


def _let_go(storage: Any) -> None:
    """Close all connections."""
    if hasattr(storage, "engine"):
        storage.remove_session()
        storage.engine.dispose()
    else:
        storage.close()


def shown_url(url: str) -> str:
    """An address without the password in it."""
    scheme, found, rest = url.partition("://")
    user, at, place = rest.rpartition("@")
    return f"{scheme}{found}{user.partition(':')[0]}{at}{place}"


def digest(identity: Mapping[str, Any]) -> str:
    """What a trial says of the device, kernel and toolchain that it is of."""
    return hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode()).hexdigest()[:16]


def _open_study(storage: Any, name: str, identity: Mapping[str, Any], problem: str) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # What is tried is said by whoever claims it: the sampler is never asked.
    sampler = optuna.samplers.RandomSampler()
    study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
    found = study.user_attrs.get("identity")
    if found is None:
        study.set_user_attr("identity", dict(identity))
        study.set_user_attr("problem", problem)
    elif found != dict(identity):
        wrong = next(key for key in sorted({*found, *identity}) if found.get(key) != identity.get(key))
        raise JournalError(
            f"the study `{name}` belongs to another run: its {wrong} is `{found.get(wrong)}`, this one's `{identity.get(wrong)}`",
            hint="numbers of different devices, kernels or toolchains are never merged",
        )
    return study


def _owner(path: Path) -> str:
    """A word that tells this journal's claims from others': who holds the file's lock knows that its earlier tunes are over."""
    kept = path.with_suffix(".owner")
    try:
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        return kept.read_text().strip()
    except OSError as error:
        raise JournalError(f"cannot write {kept}: {error.strerror}", hint="free some space") from error


def _beat(study: optuna.Study, trial: optuna.Trial) -> None:
    record = getattr(study._storage, "record_heartbeat", None)
    if record is not None:
        record(trial._trial_id)


def _state(record: Record) -> TrialState:
    """Without a number a trial is pruned, in optuna's word; `FAIL` is what was claimed and never finished."""
    return TrialState.PRUNED if value_ms(record.outcome) is None else TrialState.COMPLETE


def _attribute(record: Record) -> str:
    return f"record {record.role} {hashlib.sha256(repr(_sorted(record)).encode()).hexdigest()[:16]}"


def _sorted(record: Record) -> Any:
    entrants = [sorted(one.config.items()) for one in record.race.entrants] if record.race else []
    beside = sorted((record.beside or {}).items())
    return sorted(record.config.items()), beside, sorted(entrants), record.attempt


def _distributions(space: Space) -> dict[str, Any]:
    return {param.name: optuna.distributions.CategoricalDistribution(param.values) for param in space.params}


@contextlib.contextmanager
def _no_word_of_experiments() -> Iterator[None]:
    """Heartbeats and the proxy are experimental in optuna, and it expects that `optimize` renews them; we do. That need not
    be said in every run."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed to be used")
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


@contextlib.contextmanager
def _reaching(shown: str) -> Iterator[None]:
    """What a storage that does not answer raises, in our words."""
    try:
        yield
    except Exception as error:
        if not _is_about_reaching(error):
            raise
        raise JournalError(
            f"the storage {shown} does not answer: {str(error.__cause__ or error).strip().splitlines()[0]}",
            hint="see whether it runs and can be reached, then run the same command again; what was finished is kept",
        ) from error


def _is_about_reaching(error: Exception) -> bool:
    packages = {each.__module__.partition(".")[0] for each in type(error).__mro__}
    return isinstance(error, optuna.exceptions.StorageInternalError | ConnectionError) or bool(
        packages & {"sqlalchemy", "psycopg", "grpc"}
    )
