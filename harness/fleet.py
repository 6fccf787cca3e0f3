"""A runner whose children are anywhere: Ray schedules compilers on CPUs, and one actor on each accelerator of one model.

An accelerator is the custom resource `flashtune_device:MODEL` of a Ray node, and an actor asks for one of just that name, so no
other model can be given a candidate. In an actor works the runner that works on one machine, with its own children and limits:
what a candidate does to them is its outcome there; what befalls the actor (killed, its node gone) is never the candidate's. Ray
starts a killed actor again and calls it again; nodes that join get actors, those of nodes that leave are given up.
"""

import importlib.util
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from harness.child import failure
from harness.device import DeviceFacts
from harness.errors import HarnessError, MachineError, UsageError
from harness.outcome import KILLED, Mode, Stage
from harness.problem import Problem
from harness.space import Config
from harness.worker import Depth, Passed, Runner
from harness.workspace import set_environment

RESOURCE = "flashtune_device:"
# How often the cluster is asked who is there, and how long nobody may be, in seconds.
_LOOK_S, _PATIENCE_S = 1.0, 300.0
# A candidate is given to so many others when those who had it were lost with their nodes.
_MOVES = 3
_LOG = logging.getLogger(__name__)
_HINT = "pip install 'flashtune[fleet]'"

Place = Callable[[], Runner]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What a worker says of itself when it begins: its process and host, its device, and `digest` of all that numbers depend on
    beside the device (kernel, judges, versions); empty where nobody asks for it."""

    pid: int
    host: str
    device: DeviceFacts
    mode: Mode
    digest: str = ""


@dataclass(slots=True)
class _Device:
    """An actor on an accelerator, as the driver sees it."""

    actor: Any
    node: str
    greeting: Any
    standing: Standing | None = None
    busy: bool = False
    refused: bool = False


@dataclass(kw_only=True)
class RayRunner:
    """Implements `harness.worker.Runner` on the Ray cluster that this process is connected to.

    `place` makes the runner of one machine wherever it is called. `device` is the model asked for in mode "measured"; `digest`
    what each worker must say of itself. `gpus` are Ray's own GPUs that an actor asks for beside the resource: it sees no others.
    `ahead` is the number of batches in flight, and `most` the number of accelerators that are used.
    """

    place: Place
    device: DeviceFacts
    mode: Mode
    ahead: int = 2
    digest: str = ""
    gpus: float = 0
    most: int = 1 << 30
    patience_s: float = _PATIENCE_S
    # Workers that were not taken, and why.
    refused: list[str] = field(default_factory=list)
    _devices: list[_Device] = field(default_factory=list)
    _moment: threading.Condition = field(default_factory=threading.Condition)
    _looked_s: float = -1e9
    _closed: bool = False
    _tasks: dict[str, Any] = field(default_factory=dict)

    @property
    def workers(self) -> list[Standing]:
        """The accelerators that are there."""
        with self._moment:
            return [one.standing for one in self._devices if one.standing is not None]

    def first_standing(self) -> Standing:
        """What the first accelerator that answers says of itself, whatever that is. Raises `MachineError` where none does."""
        ray = _ray()
        until = time.monotonic() + self.patience_s
        while time.monotonic() < until:
            for node in ray.nodes():
                if node["Alive"] and node["Resources"].get(RESOURCE + self.device.name):
                    device = self._engage(node["NodeID"])
                    with self._moment:
                        self._devices.append(device)
                    try:
                        found: Standing = ray.get(device.greeting, timeout=self.patience_s)
                    except ray.exceptions.RayTaskError as error:
                        raise _ours(error) from error
                    except ray.exceptions.RayError:
                        continue
                    return found
            time.sleep(_LOOK_S)
        raise MachineError(f"no worker with {RESOURCE}{self.device.name} answers")

    def compile(self, problem: Problem, config: Config) -> Callable[[], Any]:
        return self._on_a_cpu("compile", "compile", problem, config)

    def verify(self, problem: Problem, config: Config) -> Callable[[], Any]:
        return self._anywhere("verify", "verify", problem, config)

    def value(
        self, problem: Problem, config: Config, passed: Passed, *, incumbent: Config | None, depth: Depth
    ) -> Callable[[], Any]:
        stage: Stage = "measure" if self.mode == "measured" else "estimate"
        return self._anywhere("value", stage, problem, config, passed, incumbent=incumbent, depth=depth)

    def race(self, problem: Problem, entrants: Sequence[Config], *, rounds: int, turn: int) -> Callable[[], Any]:
        return self._anywhere("race", "measure", problem, tuple(entrants), rounds=rounds, turn=turn)

    def prove(self, problem: Problem, config: Config) -> Callable[[], Any]:
        return self._anywhere("prove", "prove", problem, config)

    def close(self) -> None:
        """Let go of all actors; whoever still waits for one hears that it is over."""
        ray = _ray()
        with self._moment:
            self._closed = True
            for one in self._devices:
                with suppress(Exception):
                    ray.kill(one.actor)
            self._devices.clear()
            self._moment.notify_all()

    def _anywhere(self, method: str, stage: Stage, *given: Any, **named: Any) -> Callable[[], Any]:
        if self.mode == "measured":
            return lambda: self._on_a_device(method, stage, given, named)
        return self._on_a_cpu(method, stage, *given, **named)

    def _on_a_cpu(self, method: str, stage: Stage, *given: Any, **named: Any) -> Callable[[], Any]:
        ray = _ray()
        if not self._tasks:
            # Whoever dies under a task is replaced and the task run again, by Ray.
            self._tasks["work"] = ray.remote(num_cpus=1, max_retries=_MOVES, retry_exceptions=False)(_work)
            self._tasks["place"] = ray.put(self.place)
        promised = self._tasks["work"].remote(self._tasks["place"], method, given, named)

        def wait() -> Any:
            try:
                return ray.get(promised)
            except ray.exceptions.RayTaskError as error:
                raise _ours(error) from error
            except ray.exceptions.RayError:
                return failure(stage, KILLED, f"its Ray worker was lost {_MOVES + 1} times")

        return wait

    def _on_a_device(self, method: str, stage: Stage, given: Any, named: Any) -> Any:
        ray = _ray()
        for _ in range(_MOVES + 1):
            device = self._borrow()
            try:
                return ray.get(device.actor.call.remote(method, given, named))
            except ray.exceptions.RayTaskError as error:
                raise _ours(error) from error
            except ray.exceptions.RayError:
                # Ray had started it again where it was, as long as there was a node to do so.
                self._bury(device)
            finally:
                with self._moment:
                    device.busy = False
                    self._moment.notify()
        return failure(stage, KILLED, f"the workers that had it were lost with their nodes, {_MOVES + 1} times")

    def _borrow(self) -> _Device:
        """An accelerator that nobody uses; waits for one. Raises `MachineError` where there is none for long."""
        alone_since = time.monotonic()
        with self._moment:
            while True:
                self._look()
                if self._closed:
                    raise MachineError("the fleet was let go while a candidate waited for a device")
                ready = [one for one in self._devices if one.standing is not None]
                free = next((one for one in ready if not one.busy), None)
                if free is not None:
                    free.busy = True
                    return free
                if ready:
                    alone_since = time.monotonic()
                refused = bool(self.refused) and all(one.refused for one in self._devices)
                if refused or time.monotonic() - alone_since > self.patience_s:
                    raise MachineError(
                        f"no worker offers {RESOURCE}{self.device.name}"
                        + "".join(f"\n  {why}" for why in self.refused),
                        hint=f"ray start --address=HEAD:6379 --resources='{{\"{RESOURCE}{self.device.name}\": 1}}' on each",
                    )
                self._moment.wait(0.05 if len(ready) < len(self._devices) else _LOOK_S / 4)

    def _look(self) -> None:
        """Take on who has come, and hear who is ready."""
        ray = _ray()
        if time.monotonic() - self._looked_s > _LOOK_S and not self._closed:
            self._looked_s = time.monotonic()
            for node in ray.nodes():
                offered = int(node["Resources"].get(RESOURCE + self.device.name, 0)) if node["Alive"] else 0
                own = sum(one.node == node["NodeID"] for one in self._devices)
                for _ in range(min(offered - own, self.most - len(self._devices))):
                    self._devices.append(self._engage(node["NodeID"]))
        for one in [one for one in self._devices if one.standing is None and not one.refused]:
            heard, _ = ray.wait([one.greeting], timeout=0)
            if heard:
                self._hear(one)

    def _engage(self, node: str) -> _Device:
        ray = _ray()
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor = ray.remote(_Bench).options(
            num_cpus=0, num_gpus=self.gpus, resources={RESOURCE + self.device.name: 1}, max_restarts=-1, max_task_retries=-1,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        ).remote(self.place)  # fmt: skip
        return _Device(actor, node, actor.greet.remote())

    def _hear(self, device: _Device) -> None:
        ray = _ray()
        why = ""
        try:
            found: Standing = ray.get(device.greeting)
            if (found.device.name, found.device.arch) != (self.device.name, self.device.arch):
                why = f"{found.host} offers a {self.device.name} and has a {found.device.name} ({found.device.arch})"
            elif found.mode != self.mode or found.digest != self.digest:
                why = f"{found.host} has another kernel, judge or toolchain: {found.digest or 'unknown'}, not {self.digest}"
            else:
                device.standing = found
        except ray.exceptions.RayTaskError as error:
            why = str(_ours(error)).splitlines()[0]
        except ray.exceptions.RayError:
            # Gone before it had begun; if its node is there, somebody else begins on it.
            self._devices.remove(device)
            return
        if why:
            # It stays on the list, so that its node is not asked again.
            device.refused = True
            self.refused.append(why)
            with suppress(Exception):
                ray.kill(device.actor)

    def _bury(self, device: _Device) -> None:
        with self._moment:
            if device in self._devices:
                self._devices.remove(device)
        with suppress(Exception):
            _ray().kill(device.actor)


class _Bench:
    """The body of an actor: the runner of one machine, working on one device."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._runner: Runner | None = None

    def greet(self) -> Standing:
        return standing_of(self._place, self._made())

    def call(self, method: str, given: Any, named: Any) -> Any:
        return getattr(self._made(), method)(*given, **named)()

    def _made(self) -> Runner:
        # Not in `__init__`: what is raised there Ray takes for a death.
        if self._runner is None:
            self._runner = self._place()
        return self._runner


# The runner of this process, and what made it.
_kept: list[tuple[Place, Runner]] = []


def _work(place: Place, method: str, given: Any, named: Any) -> Any:
    """One stage on a CPU. A process of Ray's works for many tasks, and keeps what it works with."""
    if not _kept or _kept[0][0] != place:
        for _, runner in _kept:
            runner.close()
        _kept[:] = [(place, place())]
    return getattr(_kept[0][1], method)(*given, **named)()


def standing_of(place: Place, runner: Runner) -> Standing:
    """What a worker here says of itself."""
    found = getattr(place, "digest", None)
    return Standing(
        pid=os.getpid(),
        host=socket.gethostname(),
        device=runner.device,
        mode=runner.mode,
        digest=found() if found else "",
    )


def connect(address: str, *, device: str | None = None, devices: int = 0, cpus: int = 1, **more: Any) -> None:
    """Connect this process to the cluster at `ray://HOST:PORT` or `HOST:PORT`, or start one here that ends with it: `local`,
    on the loopback address, with so many CPUs and accelerators. Raises `UsageError` and `MachineError`."""
    # Nobody outside is told that Ray runs here, and where it is started here nobody outside can reach it: the second one has it
    # listen on the loopback address, as it does by itself on Windows and macOS.
    set_environment("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local":
        set_environment("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray = _ray()
    _leave_stdout_alone()
    if address.startswith("ray://") and importlib.util.find_spec("grpc") is None:
        raise MachineError("ray:// needs the package `grpc`", hint="pip install grpcio, or give HOST:PORT on a node")
    if address != "local" and "://" in address and not address.startswith("ray://"):
        raise UsageError(f"`{address}` is no Ray cluster", hint="write ray://HOST:10001, HOST:6379, or local")
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    if address == "local":
        resources = {RESOURCE + device: devices} if device and devices else {}
        quiet |= {
            "num_cpus": cpus, "resources": resources, "include_dashboard": False, "_node_ip_address": "127.0.0.1",
            "address": "local",
        }  # fmt: skip
    else:
        quiet["address"] = address
    try:
        ray.init(**quiet, **more)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise MachineError(
            f"no Ray cluster answers at {address}: {str(error).strip().splitlines()[0]}",
            hint="see `ray status` there; docs/fleet.md says how one is started",
        ) from error


def _leave_stdout_alone() -> None:
    """What Ray has to say of workers that died it prints on stdout, which is for results: it is logged instead."""
    from ray._private import worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda data, *_, **__: _LOG.info("%s", "\n".join(data.get("lines", ())))


def disconnect() -> None:
    """Leave the cluster; one that was started by `connect` ends."""
    _ray().shutdown()


def models() -> dict[str, int]:
    """The models of device in the cluster, and how many there are of each."""
    found = _ray().cluster_resources()
    return {name.removeprefix(RESOURCE): int(count) for name, count in found.items() if name.startswith(RESOURCE)}


def batches_ahead(devices: int, batch: int) -> int:
    """Batches in flight for so many devices at the beginning: twice as many candidates as devices, and three at least, so that up
    to four devices search in the same order."""
    return max(3, 1 + -(-2 * devices // batch))


def _ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise MachineError("a fleet needs the package `ray`", hint=_HINT)
    import ray

    return ray


def _ours(error: Exception) -> Exception:
    """What was raised in a worker: an error of ours as such."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, HarnessError) else error
