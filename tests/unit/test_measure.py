"""Measuring on a device that is made up: what is taken, in which order, when it ends, and what is kept."""

import inspect
import itertools
import math

import numpy as np
import pytest

from harness.errors import MachineError
from harness.measure import CudaTimer, Policy, cuda_timer, measure
from harness.sensor import Sensor
from harness.stats import compare
from tests.fakes import H200, MI300X, FakeDevice, FakeTorch, fake_nvml, normal

COLD = Policy(warmup_ms=0, target=0.01, min_samples=10, max_samples=60, budget_ms=1e6)


def _measure(device, policy=COLD, *, cost_ms=1.0, incumbent_ms=None, seed=3):
    rival = None if incumbent_ms is None else device.kernel("incumbent", incumbent_ms)
    return measure(
        device.kernel("candidate", cost_ms),
        timer=device,
        policy=policy,
        rng=np.random.default_rng(seed),
        incumbent=rival,
        now_ms=device.now_ms,
    )


@pytest.fixture
def device():
    return FakeDevice(np.random.default_rng(11), noise=normal(0.005))


def test_a_quiet_device_needs_the_fewest_samples():
    samples = _measure(FakeDevice(np.random.default_rng(0)))
    assert samples.times_ms == (1.0,) * COLD.min_samples
    assert samples.median_ms == 1.0


def test_more_noise_takes_more_samples():
    counts = [
        len(_measure(FakeDevice(np.random.default_rng(5), noise=normal(sigma))).times_ms)
        for sigma in (0.001, 0.02, 0.5)
    ]
    assert counts[0] == COLD.min_samples
    assert COLD.min_samples < counts[1] < COLD.max_samples
    assert counts[2] == COLD.max_samples


def test_how_long_a_kernel_takes_does_not_change_how_often_it_is_timed():
    counts = {
        len(_measure(FakeDevice(np.random.default_rng(5), noise=normal(0.02)), cost_ms=cost).times_ms)
        for cost in (0.01, 1.0, 100.0)
    }
    assert len(counts) == 1


def test_a_noisy_ratio_keeps_sampling_though_the_candidate_is_known():
    device = FakeDevice(np.random.default_rng(5))
    quiet, noisy = device.kernel("candidate", 1.0), device.kernel("incumbent", 1.0)
    wobble = itertools.cycle([1.0, 1.3, 0.8, 1.6])

    def unsteady():
        device.noise = lambda rng: next(wobble)
        noisy()
        device.noise = lambda rng: 1.0

    samples = measure(
        quiet, timer=device, policy=COLD, rng=np.random.default_rng(0), incumbent=unsteady, now_ms=device.now_ms
    )
    assert len(samples.times_ms) == COLD.max_samples


def test_candidate_and_incumbent_take_turns_in_random_order(device):
    samples = _measure(device, Policy(warmup_ms=0, min_samples=60, max_samples=60, flush_l2=False), incumbent_ms=1.1)
    turns = [tuple(device.log[i : i + 2]) for i in range(0, len(device.log), 2)]
    warmup, rounds = turns[0], turns[1:]
    assert set(warmup) == {"candidate", "incumbent"}
    assert all(set(turn) == {"candidate", "incumbent"} for turn in rounds)
    assert len(rounds) == len(samples.times_ms) == len(samples.incumbent_ms) == 60
    first = [turn[0] for turn in rounds].count("candidate")
    assert 15 <= first <= 45


def test_the_order_of_turns_comes_from_the_generator():
    logs = []
    for seed in (1, 1, 2):
        device = FakeDevice(np.random.default_rng(0))
        _measure(device, incumbent_ms=1.0, seed=seed)
        logs.append(device.log)
    assert logs[0] == logs[1] != logs[2]


def test_l2_is_flushed_before_every_single_launch(device):
    samples = _measure(device, incumbent_ms=1.0)
    assert device.log[0::2] == ["flush"] * (len(device.log) // 2)
    assert "flush" not in device.log[1::2]
    assert samples.method == "event, L2 flushed"


def test_a_warm_policy_never_flushes(device):
    samples = _measure(device, Policy(warmup_ms=0, flush_l2=False))
    assert "flush" not in device.log
    assert samples.method == "event, L2 warm"


def test_warm_up_lasts_as_long_as_asked_and_is_not_kept():
    device = FakeDevice(np.random.default_rng(0), drift=1.0)
    samples = _measure(device, Policy(warmup_ms=20, min_samples=1, max_samples=1, flush_l2=False))
    assert device.launches == 21
    assert samples.times_ms[0] > 1.019  # the clock had drifted by the end of the warm-up


def test_a_hopeless_candidate_is_given_up_early(device):
    samples = _measure(device, cost_ms=4.0, incumbent_ms=1.0)
    assert len(samples.times_ms) == COLD.hopeless_after
    assert len(samples.incumbent_ms) == COLD.hopeless_after


@pytest.mark.parametrize("cost_ms", [2.5, 0.2])
def test_a_candidate_with_hope_is_measured_out(device, cost_ms):
    assert len(_measure(device, cost_ms=cost_ms, incumbent_ms=1.0).times_ms) >= COLD.min_samples


def test_slow_samples_alone_give_nobody_up():
    # Launches 0 and 1 warm up; of the six that follow, the candidate's first two are read as very slow.
    device = FakeDevice(np.random.default_rng(0))
    probe = FakeDevice(np.random.default_rng(0))
    _measure(probe, Policy(warmup_ms=0, flush_l2=False), incumbent_ms=1.0)
    slow = [number for number, name in enumerate(probe.log) if name == "candidate"][1:3]
    device.readings = dict.fromkeys(slow, 50.0)
    assert len(_measure(device, incumbent_ms=1.0).times_ms) >= COLD.min_samples


def test_the_budget_ends_it_even_before_the_fewest_samples(device):
    samples = _measure(device, Policy(warmup_ms=0, budget_ms=35), cost_ms=10.0)
    assert len(samples.times_ms) == 4


def test_flushing_counts_against_the_budget(device):
    device.flush_ms = 20.0
    assert len(_measure(device, Policy(warmup_ms=0, budget_ms=100, target=0)).times_ms) == 5


def test_one_round_takes_place_whatever_the_budget(device):
    samples = _measure(device, Policy(warmup_ms=0, budget_ms=0), incumbent_ms=1.0)
    assert len(samples.times_ms) == len(samples.incumbent_ms) == 1


def test_raw_samples_are_kept_in_order_outliers_included():
    device = FakeDevice(np.random.default_rng(0), readings={1: 1.0, 2: 1.25, 3: 40.0, 4: 0.5})
    samples = _measure(device, Policy(warmup_ms=0, min_samples=4, max_samples=4, flush_l2=False))
    assert samples.times_ms == (1.0, 1.25, 40.0, 0.5)


def test_clocks_are_logged_beside_each_sample_of_the_candidate():
    device = FakeDevice(np.random.default_rng(0), drift=5.0)
    samples = _measure(device, Policy(warmup_ms=0, min_samples=20, max_samples=20), incumbent_ms=1.0)
    assert len(samples.clocks_mhz) == 20
    assert list(samples.clocks_mhz) == sorted(samples.clocks_mhz, reverse=True)
    assert samples.clocks_mhz[-1] < 0.9 * 1800


def test_a_clock_that_cannot_be_read_leaves_no_trace(device):
    device.base_clock_mhz = None
    assert _measure(device).clocks_mhz == ()


@pytest.mark.parametrize(("launch", "marked"), [(0, False), (5, True)])
def test_throttling_marks_the_samples_but_not_the_warm_up(device, launch, marked):
    device.throttled_at = (launch,)
    assert _measure(device).throttled is marked


def test_a_failing_launch_comes_through(device):
    device.fail_at = 6
    with pytest.raises(RuntimeError, match="launch 6 of candidate failed"):
        _measure(device)


@pytest.mark.parametrize("reading", [0.0, -1.0, math.nan, math.inf])
def test_a_reading_that_is_no_time_is_refused(device, reading):
    device.readings = {4: reading}
    with pytest.raises(MachineError, match=f"the timer gave {reading} ms") as refusal:
        _measure(device)
    assert "`graph`" in refusal.value.hint


def test_a_graph_is_captured_once_and_its_time_divided(device):
    device.noise = lambda rng: 1.0
    policy = Policy(warmup_ms=0, method="graph", copies=20, flush_l2=False, min_samples=6, max_samples=6)
    samples = _measure(device, policy, cost_ms=0.01, incumbent_ms=0.02)
    assert device.log[:4] == ["candidate", "capture 20", "incumbent", "capture 20"]
    assert device.log.count("capture 20") == 2
    assert samples.times_ms == pytest.approx((0.01,) * 6)
    assert samples.incumbent_ms == pytest.approx((0.02,) * 6)
    assert samples.method == "graph of 20, L2 warm"


def test_a_difference_of_three_percent_is_told_through_a_falling_clock(device):
    device.drift = 0.5
    rng = np.random.default_rng(4)
    samples = _measure(device, cost_ms=0.97, incumbent_ms=1.0)
    assert compare(samples.times_ms, samples.incumbent_ms, rng=rng).verdict == "faster"


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"min_samples": 0}, "1 <= min <= max, found 0 and 200"),
        ({"min_samples": 9, "max_samples": 8}, "found 9 and 8"),
        ({"copies": 4}, "found 4 with the method `event`"),
        ({"method": "graph", "copies": 4}, "cannot each start with a flushed L2"),
        ({"method": "graph", "copies": 0, "flush_l2": False}, "0 copies"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(wrong, complaint):
    with pytest.raises(ValueError, match=complaint):
        Policy(**wrong)


def test_cuda_timer_times_between_two_events_on_its_device():
    torch = FakeTorch(H200, H200, elapsed_ms=0.75)
    timer = CudaTimer(torch, index=1)
    assert timer.time_ms(lambda: torch.log.append("run")) == 0.75
    assert torch.log == ["enter device cuda:1", "record", "run", "record", "wait for event", "leave device cuda:1"]


@pytest.mark.parametrize(
    ("gpu", "hip", "least"),
    [(H200, False, 2 * 62914560), (MI300X, True, 512 << 20), (H200 | {"L2_cache_size": 200 << 20}, False, 400 << 20)],
)
def test_cuda_timer_flushes_at_least_twice_the_l2(gpu, hip, least):
    torch = FakeTorch(gpu, hip=hip)
    timer = CudaTimer(torch)
    timer.flush()
    timer.flush()
    assert timer.flush_bytes >= least
    assert torch.log == [f"empty {timer.flush_bytes} int8 on cuda:0", "zero", "zero"]


def test_cuda_timer_captures_all_copies_on_a_stream_of_its_own():
    torch = FakeTorch(H200)
    replay = CudaTimer(torch).capture(lambda: torch.log.append("run"), 3)
    assert torch.log == [
        "enter device cuda:0",
        "side waits for current",
        "synchronize",
        "enter capture on side",
        "run",
        "run",
        "run",
        "leave capture on side",
        "current waits for side",
        "leave device cuda:0",
    ]
    replay()
    assert torch.log[-1] == "replay"


def test_cuda_timer_without_a_sensor_knows_no_clock_and_with_one_reads_it():
    torch = FakeTorch(H200)
    assert (CudaTimer(torch).clock_mhz(), CudaTimer(torch).slowed(), CudaTimer(torch).heat()) == (
        None,
        (),
        (None, None),
    )
    hot = Sensor(fake_nvml(ClockInfo=1200, CurrentClocksEventReasons=0x40), "gpu")
    timer = CudaTimer(torch, sensor=hot)
    assert (timer.clock_mhz(), timer.slowed(), timer.heat()) == (1200, ("hardware thermal slowdown",), (41, 120.5))


def test_cuda_timer_is_made_of_what_can_be_loaded():
    modules = {"torch": FakeTorch(H200), "pynvml": fake_nvml(ClockInfo=1755)}
    assert cuda_timer(load=modules.__getitem__).clock_mhz() == 1755


def test_no_gpu_and_no_torch_are_named():
    with pytest.raises(MachineError, match=r"GPU 1 was asked for, torch 2\.13\.0\+fake sees 1"):
        cuda_timer(1, load={"torch": FakeTorch(H200)}.__getitem__)
    with pytest.raises(MachineError, match="sees 0"):
        cuda_timer(load={"torch": FakeTorch()}.__getitem__)

    def missing(name):
        raise ImportError(f"no module named {name}")

    with pytest.raises(MachineError, match="torch cannot be imported: no module named torch"):
        cuda_timer(load=missing)


def test_the_real_torch_has_what_the_fake_one_has():
    cuda = pytest.importorskip("torch").cuda
    assert [name for name in vars(FakeTorch(H200).cuda) if not hasattr(cuda, name)] == []
    assert "enable_timing" in inspect.signature(cuda.Event.__new__).parameters
    assert "stream" in inspect.signature(cuda.graph.__init__).parameters
    for owner, names in {
        cuda.Event: ("record", "synchronize", "elapsed_time"),
        cuda.Stream: ("wait_stream",),
        cuda.CUDAGraph: ("replay",),
    }.items():
        assert [name for name in names if not hasattr(owner, name)] == []


def test_all_graphs_are_captured_on_one_stream():
    torch = FakeTorch(H200)
    made = []
    stream = torch.cuda.Stream
    torch.cuda.Stream = lambda: made.append(stream()) or made[-1]
    timer = CudaTimer(torch)
    timer.capture(lambda: None, 1)
    timer.capture(lambda: None, 1)
    assert made == [timer.stream]
