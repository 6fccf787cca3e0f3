"""Trials on several devices of one model: many are judged and measured at a time, and recorded in the order of asking.

What is proposed depends on that order and on the number of batches in flight, not on how many devices there are or which was
faster. Cards of one model differ by some percent: each candidate is timed beside the anchor on its own card, and only that ratio
counts. Refuses to begin before there is an anchor.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from harness.errors import OutOfTimeError
from harness.outcome import Record
from harness.space import Config
from harness.trials import Ended, Flight, Trials

# Candidates in flight at most: each has a thread, which waits.
_THREADS = 256


@dataclass(slots=True)
class Lanes(Trials):
    """`Trials` whose runner tries several candidates at a time. `start` sends all of them off, once the anchor has its time."""

    _sent: dict[Config, "Future[tuple[Ended, float]]"] = field(default_factory=dict)
    _waiting: deque[Flight] = field(default_factory=deque)
    _over: bool = False
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(_THREADS, thread_name_prefix="lane")
    )

    def start(self, configs: list[Config]) -> Flight:
        flight = Trials.start(self, configs)
        self._waiting.append(flight)
        self._send()
        return flight

    def finish(self, flight: Flight) -> Iterator[tuple[Config, Record, bool]]:
        for config in flight.configs:
            self._send()
            record = self._known(config) if self._is_new(config) else flight.known[config]
            again = config not in flight.compiling or self._is_new(config)
            if record is None or not again:
                sent = self._sent.pop(config, None)
                ended, seconds = sent.result() if sent else self._try(flight, config)
                record = self._recorded(config, self._as_its_twin(ended), record, seconds)
                self._append(record)
            self._remember(record)
            yield config, record, again

    def rest(self) -> None:
        self._over = True

    def _as_its_twin(self, ended: Ended) -> Ended:
        """Of two with the same machine code that ran at the same time, the one that was asked for first counts."""
        artifact = getattr(ended.outcome, "artifact", None)
        twin = self._by_code.get(artifact.code_hash) if artifact and ended.twin is None else None
        return ended if twin is None else Ended(twin.outcome, twin=twin, beside=twin.beside)

    def _send(self) -> None:
        """Send off what waits, if there is an anchor to be measured beside."""
        while self.anchor is not None and self._waiting:
            flight = self._waiting.popleft()
            for config in flight.compiling:
                if config not in self._sent and not self._is_new(config):
                    self._sent[config] = self._threads.submit(self._try, flight, config)

    def _try(self, flight: Flight, config: Config) -> tuple[Ended, float]:
        """How a candidate ended, and the seconds from its being sent off; several do this at a time."""
        began = self.now_s()
        compiled = self._admit(flight.compiling[config](), config)
        if self._over:
            raise OutOfTimeError("the budget ended before a candidate was judged")
        self._judge_soon(config, compiled)
        return self._end(config, compiled), self.now_s() - began
