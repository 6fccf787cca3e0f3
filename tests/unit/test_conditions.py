"""What was the matter with a device while it was measured: readings, marks in records, the canary, what a person reads of it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from harness import canary, report, timing
from harness.measure import Policy, cuda_timer, measure
from harness.outcome import RECORDS, Measured
from harness.sensor_amd import AmdSensor, open_amd_sensor
from tests.fake_runner import FakeRunner
from tests.fakes import MI300X, FakeDevice, FakeTorch
from tests.unit.test_tune import run


class AmdSmiError(Exception):
    pass


def fake_smi(metrics, bdf="0000:c1:00.0"):
    def answer(handle):
        if isinstance(metrics, Exception):
            raise metrics
        return metrics

    return SimpleNamespace(
        AmdSmiException=AmdSmiError, amdsmi_init=lambda: None, amdsmi_get_processor_handles=lambda: ["other", "gpu"],
        amdsmi_get_gpu_device_bdf=lambda handle: bdf if handle == "gpu" else "0000:01:00.0",
        amdsmi_get_gpu_metrics_info=answer,
    )  # fmt: skip


PLACE = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
METRICS = {
    "current_gfxclk": 0xFFFF, "current_gfxclks": [2100, 2090, 0xFFFF], "temperature_hotspot": 71,
    "average_socket_power": "N/A", "current_socket_power": 640, "throttle_status": "N/A", "indep_throttle_status": 0x4,
}  # fmt: skip


def test_an_amd_gpu_is_found_by_its_place_and_read() -> None:
    sensor = open_amd_sensor(PLACE, {"amdsmi": fake_smi(METRICS)}.__getitem__)
    assert (sensor.clock_mhz(), sensor.heat(), sensor.slowed()) == (2090, (71, 640.0), ("throttle status 0x4",))
    assert open_amd_sensor(PLACE, {"amdsmi": fake_smi(METRICS, bdf="0000:c2:00.0")}.__getitem__) is None
    assert open_amd_sensor(PLACE, {}.__getitem__) is None
    assert open_amd_sensor(SimpleNamespace(), {"amdsmi": fake_smi(METRICS)}.__getitem__) is None


@pytest.mark.parametrize("metrics", [{}, AmdSmiError("gone"), {"current_gfxclks": ["N/A"]}])
def test_what_an_amd_gpu_does_not_say_is_none(metrics) -> None:
    sensor = AmdSensor(fake_smi(metrics), "gpu")
    assert (sensor.clock_mhz(), sensor.heat(), sensor.slowed()) == (None, (None, None), ())


def test_the_timer_of_an_amd_gpu_has_its_sensor() -> None:
    place = MI300X | {"pci_domain_id": 0, "pci_bus_id": 0xC1, "pci_device_id": 0}
    modules = {"torch": FakeTorch(place, hip=True), "amdsmi": fake_smi(METRICS)}
    assert cuda_timer(load=modules.__getitem__).heat() == (71, 640.0)


def test_throttling_marks_the_samples_with_what_it_was() -> None:
    device = FakeDevice(np.random.default_rng(0), throttled_at=(5,))
    device.heat = iter([(60, 300.0), (64, None)]).__next__
    policy = Policy(warmup_ms=0, min_samples=10, max_samples=10)
    samples = measure(device.kernel("a", 1.0), timer=device, policy=policy, rng=device.rng, now_ms=device.now_ms)
    assert (samples.throttled, samples.throttle) == (True, ("power cap",))
    assert (samples.temperature_c, samples.power_w) == (64, 300.0)


def test_a_person_reads_that_the_clock_was_lowered_and_that_the_canary_drifted(tmp_path) -> None:
    class Warming(FakeRunner):
        def value(self, problem, config, passed, *, incumbent, depth):
            wait = super().value(problem, config, passed, incumbent=incumbent, depth=depth)
            slow = 0.1 * (1 + 0.001 * self.calls["value screen"])

            def number():
                found = wait()
                samples = replace(
                    found.samples, throttled=slow > 0.102, throttle=("power cap",) * (slow > 0.102), canary_ms=slow
                )
                return replace(found, samples=samples)

            return number

    _, settled = run(Warming("measured"), tmp_path)
    said = " ".join(str(report.settled_lines(settled, "measured")).split())
    assert "Clock lowered: during 14 of 33 measurements: power cap" in said
    assert "Drift: the canary took 2.9 % longer at the end" in said
    again = RECORDS.validate_json(RECORDS.dump_json(settled.records[-1]))
    assert isinstance(again.outcome, Measured) and again == settled.records[-1]


def test_a_canary_is_answered_by_what_computes_and_complains_of_what_does_not(monkeypatch) -> None:
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    assert canary.complaint() == ""
    real = canary.torch.ones
    with monkeypatch.context() as patch:
        patch.setattr(canary.torch, "ones", lambda *shape, **named: 2 * real(*shape, **named))
        assert "the canary was answered wrongly" in canary.complaint()

    def fail(*shape, **named):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(canary.torch, "ones", fail)
    assert canary.complaint() == "the canary failed: CUDA error: an illegal memory access was encountered"
