"""What probing makes of machines that are made up, and of the one that is here."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from pydantic import TypeAdapter

from harness.device import TARGETS
from harness.errors import MachineError
from harness.probe import Finding, Gpu, Machine, Package, git_commit, live_device, probe, toolchain, trust
from harness.sensor import THROTTLING, Sensor, driver_version, load_nvml, open_sensor
from tests.fakes import H200, MI300X, FakeNvmlError, FakeTorch, fake_nvml

MODULES = {
    "triton": SimpleNamespace(__version__="3.6.0", __file__="/site/triton/__init__.py"),
    "numpy": SimpleNamespace(__version__="2.3.5"),
}


def _loading(**modules):
    known = MODULES | modules

    def load(name):
        found = known.get(name)
        if isinstance(found, Exception):
            raise found
        if found is None:
            raise ModuleNotFoundError(f"No module named '{name}'")
        return found

    return load


def _probe(**modules) -> Machine:
    return probe(load=_loading(**modules), commit=lambda root: "abc123")


def _codes(machine: Machine) -> list[str]:
    return [finding.code for finding in trust(machine)]


HEALTHY = _probe(torch=FakeTorch(H200), pynvml=fake_nvml())


def _with_gpu(**readings) -> Machine:
    return _probe(torch=FakeTorch(H200), pynvml=fake_nvml(**readings))


def test_a_gpu_is_described_by_torch_and_its_sensor():
    assert HEALTHY.driver == "570.86.15"
    assert HEALTHY.nvml == Package(version="12.570.86")
    assert HEALTHY.commit == "abc123"
    assert HEALTHY.gpus == (
        Gpu(
            index=0,
            name="NVIDIA H200",
            arch="sm_90",
            multiprocessors=132,
            memory_bytes=150_110_011_392,
            warp_size=32,
            warps_per_sm=64,
            shared_bytes_per_block=227 << 10,
            shared_bytes_per_sm=228 << 10,
            l2_bytes=60 << 20,
            memory_gb_per_s=4916.736,
            clock_max_mhz=1980,
            clock_mhz=1980,
            temperature_c=41,
            power_w=120.5,
            power_limit_w=700.0,
            throttle=(),
            other_processes=0,
        ),
    )


def test_a_machine_travels_as_json():
    adapter = TypeAdapter(Machine)
    assert adapter.validate_json(adapter.dump_json(HEALTHY)) == HEALTHY


def test_a_healthy_machine_raises_no_finding():
    assert trust(HEALTHY) == []


def test_an_amd_gpu_is_described_without_nvml():
    machine = _probe(torch=FakeTorch(MI300X, hip=True))
    gpu = machine.gpus[0]
    assert (gpu.arch, gpu.warps_per_sm, gpu.shared_bytes_per_block) == ("gfx942", 32, 65536)
    assert (gpu.clock_max_mhz, gpu.clock_mhz, gpu.memory_gb_per_s) == (2100, None, None)
    assert _codes(machine) == ["no-sensor"]


def test_a_torch_that_does_not_tell_the_opt_in_limit_gets_it_from_the_multiprocessor():
    old = {key: value for key, value in H200.items() if key != "shared_memory_per_block_optin"}
    assert _probe(torch=FakeTorch(old)).gpus[0].shared_bytes_per_block == 227 << 10


@pytest.mark.parametrize(
    ("torch", "why"),
    [
        (FakeTorch(cuda=False), "torch 2.13.0+fake sees no GPU: it is built without CUDA or ROCm"),
        (FakeTorch(), "torch 2.13.0+fake sees no GPU: no driver or no device answers"),
        (OSError("libcudart.so.12: cannot open"), "torch is missing: OSError: libcudart.so.12: cannot open"),
        (None, "torch is missing: ModuleNotFoundError: No module named 'torch'"),
    ],
)
def test_a_machine_without_a_gpu_says_why(torch, why):
    machine = _probe(torch=torch)
    assert machine.gpus == ()
    assert machine.no_gpu == why
    worst = trust(machine)[-1]
    assert worst == Finding(
        severity="error",
        code="no-gpu",
        message=f"no GPU is here: {why}",
        hint="measure on a machine with a GPU, or ask for estimates of a named target with `--target`",
    )
    assert live_device(machine) is None


def test_a_gpu_that_cannot_be_queried_is_no_gpu():
    torch = FakeTorch(H200)

    def lost(index):
        raise RuntimeError("CUDA error: unspecified launch failure")

    torch.cuda.get_device_properties = lost
    assert _probe(torch=torch).no_gpu == "torch cannot query the GPU: CUDA error: unspecified launch failure"


def test_missing_packages_are_findings_with_their_reason():
    machine = probe(load=_loading(triton=None, numpy=None), commit=lambda root: None)
    assert _codes(machine) == ["no-torch", "no-triton", "no-numpy", "no-gpu"]
    assert "No module named 'triton'" in trust(machine)[1].message
    assert machine.commit is None


@pytest.mark.parametrize(
    ("triton", "numpy", "codes"),
    [
        ("3.5.1", "2.3.5", ["old-triton"]),
        ("3.6.0", "2.4.0", ["numpy-interpreter"]),
        ("3.6.0+git88ff", "2.10.1", ["numpy-interpreter"]),
        ("3.7.0", "2.4.0", []),
        ("3.10.0", "2.3.5", []),
    ],
)
def test_versions_are_compared_as_numbers(triton, numpy, codes):
    modules = {"triton": SimpleNamespace(__version__=triton), "numpy": SimpleNamespace(__version__=numpy)}
    assert _codes(_probe(torch=FakeTorch(H200), pynvml=fake_nvml(), **modules)) == codes


def test_the_interpreter_matters_most_where_there_is_no_gpu():
    modules = {"numpy": SimpleNamespace(__version__="2.4.0")}
    for torch, severity in ((FakeTorch(H200), "warning"), (FakeTorch(), "error")):
        found = {finding.code: finding.severity for finding in trust(_probe(torch=torch, **modules))}
        assert found["numpy-interpreter"] == severity


@pytest.mark.parametrize(
    ("readings", "code", "severity", "words"),
    [
        ({"CurrentClocksEventReasons": 0x40, "ClockInfo": 1100}, "throttled", "error", "1100 of 1980 MHz"),
        ({"CurrentClocksEventReasons": 0x08}, "throttled", "error", "hardware slowdown"),
        ({"CurrentClocksEventReasons": 0x04, "PowerUsage": 699000}, "power-cap", "warning", "699.0 of 700.0 W"),
        ({"CurrentClocksEventReasons": 0x10}, "sync-boost", "warning", "slower GPU"),
        ({"CurrentClocksEventReasons": 0x02}, "fixed-clock", "note", "fixed by a user"),
        ({"ComputeRunningProcesses": [SimpleNamespace(pid=1)]}, "shared-gpu", "warning", "1 other compute process"),
    ],
)
def test_what_disturbs_a_gpu_is_a_finding(readings, code, severity, words):
    (finding,) = trust(_with_gpu(**readings))
    assert (finding.code, finding.severity) == (code, severity)
    assert "GPU 0 (NVIDIA H200)" in finding.message
    assert words in finding.message
    assert finding.hint


def test_findings_come_gravest_first():
    machine = _with_gpu(CurrentClocksEventReasons=0x02 | 0x04 | 0x20)
    assert [finding.severity for finding in trust(machine)] == ["error", "warning", "note"]


def test_an_idle_gpu_is_not_throttled():
    idle = Sensor(fake_nvml(CurrentClocksEventReasons=0x01), "gpu")
    assert idle.throttle() == ("idle",)
    assert not idle.slowed()


def test_old_drivers_are_asked_by_the_old_name():
    old = fake_nvml(CurrentClocksEventReasons=FakeNvmlError("function not found"), CurrentClocksThrottleReasons=0x80)
    assert Sensor(old, "gpu").throttle() == ("power brake",)


def test_a_driver_that_says_nothing_gives_none_and_no_failure():
    mute = fake_nvml(**dict.fromkeys(("ClockInfo", "PowerUsage", "ComputeRunningProcesses"), FakeNvmlError("no")))
    mute.nvmlDeviceGetCurrentClocksEventReasons = mute.nvmlDeviceGetClockInfo
    sensor = Sensor(mute, "gpu")
    assert (sensor.clock_mhz(), sensor.throttle(), sensor.slowed()) == (None, None, ())
    readings = sensor.readings(1)
    assert (readings["power_w"], readings["other_processes"], readings["temperature_c"]) == (None, None, 41)


@pytest.mark.parametrize(
    ("pids", "here", "others"),
    [
        ([], set(), 0),
        ([7], {7}, 0),
        ([7, 8], {7, 8}, 1),
        ([8], {8}, 1),  # we have not touched the GPU, somebody else has
        ([900], set(), 0),  # in a container, our own number is that of the host
        ([900, 901], set(), 1),
    ],
)
def test_other_processes_are_those_that_are_not_us(pids, here, others):
    nvml = fake_nvml(ComputeRunningProcesses=[SimpleNamespace(pid=pid) for pid in pids])
    assert Sensor(nvml, "gpu").other_processes(7, visible=here.__contains__) == others


def test_the_sensor_is_found_by_uuid_not_by_number():
    asked = []
    nvml = fake_nvml(HandleByUUID=lambda uuid: asked.append(uuid) or uuid)
    torch = FakeTorch(H200, H200 | {"uuid": "GPU-second"})
    for index in (0, 1):
        assert open_sensor(torch, index, _loading(pynvml=nvml)) is not None
    assert asked == [f"GPU-{H200['uuid']}", "GPU-second"]


def test_no_sensor_where_nvml_does_not_know_the_gpu_or_does_not_start():
    torch = FakeTorch(H200)
    assert open_sensor(torch, 0, _loading(pynvml=fake_nvml(HandleByUUID=FakeNvmlError("not found")))) is None
    dead = fake_nvml(Init=FakeNvmlError("Driver Not Loaded"))
    assert load_nvml(_loading(pynvml=dead)) == (None, "NVML does not start: Driver Not Loaded")
    assert open_sensor(torch, 0, _loading(pynvml=dead)) is None
    assert "NVML does not start: Driver Not Loaded" in trust(_probe(torch=torch, pynvml=dead))[0].message


def test_a_driver_version_that_cannot_be_read_is_none():
    assert _probe(torch=FakeTorch(H200), pynvml=fake_nvml(DriverVersion=FakeNvmlError("no"))).driver is None


def test_a_named_target_keeps_its_rates_and_takes_the_live_limits():
    facts = live_device(_probe(torch=FakeTorch(H200 | {"multi_processor_count": 130}), pynvml=fake_nvml()))
    assert facts is not None
    assert facts.name == "h200"
    assert (facts.multiprocessors, facts.l2_bytes) == (130, 60 << 20)
    assert facts.matrix_tflops == TARGETS["h200"].matrix_tflops
    assert facts.clock_mhz == TARGETS["h200"].clock_mhz
    assert facts.source.startswith(TARGETS["h200"].source)
    assert "as read here" in facts.source


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "nvidia-h100-pcie"),
        ("NVIDIA H100 NVL", "nvidia-h100-nvl"),
        ("NVIDIA GH200 480GB", "nvidia-gh200-480gb"),
        ("NVIDIA H200 MIG 1g.18gb", "nvidia-h200-mig-1g-18gb"),
        ("NVIDIA H20", "nvidia-h20"),
    ],
)
def test_only_the_very_model_takes_the_name_of_a_target(product, name):
    facts = live_device(_probe(torch=FakeTorch(H200 | {"name": product})))
    assert facts is not None
    assert facts.name == name


def test_a_second_gpu_is_asked_for_by_number():
    machine = _probe(torch=FakeTorch(H200, H200 | {"name": "NVIDIA H100 80GB HBM3"}))
    assert live_device(machine, index=1).name == "h100"
    assert live_device(machine, index=2) is None


def test_amd_is_matched_too():
    assert live_device(_probe(torch=FakeTorch(MI300X, hip=True))).name == "mi300x"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_generic_rates_agree_with_the_published_figures_of_each_target(name):
    target = TARGETS[name]
    gpu = Gpu(
        index=0,
        name="Some Card",
        arch=target.arch,
        multiprocessors=target.multiprocessors,
        memory_bytes=1 << 34,
        warp_size=target.warp_size,
        warps_per_sm=target.warps_per_sm,
        clock_max_mhz=target.clock_mhz,
        shared_bytes_per_block=target.shared_bytes_per_block,
        shared_bytes_per_sm=target.shared_bytes_per_sm,
    )
    missing = Package(version=None)
    machine = Machine(
        platform="", python="", cores=1, memory_bytes=None, torch=missing, triton=missing, numpy=missing, nvml=missing,
        gpus=(gpu,),
    )  # fmt: skip
    facts = live_device(machine)
    assert facts.name == "some-card"
    for dtype, published in target.matrix_tflops.items():
        assert facts.matrix_tflops[dtype] == pytest.approx(published, rel=0.1), dtype
    assert facts.matrix_tflops.keys() == target.matrix_tflops.keys()
    for field in ("registers_per_sm", "registers_per_thread", "blocks_per_sm", "fma_per_clock", "special_per_clock"):
        assert getattr(facts, field) == getattr(target, field), field


@pytest.mark.parametrize(
    ("arch", "nearest"), [((10, 3), "sm_100"), ((8, 7), "sm_86"), ((13, 0), "sm_120"), ((6, 1), "sm_70")]
)
def test_an_unknown_architecture_borrows_from_the_nearest_and_says_so(arch, nearest):
    torch = FakeTorch(H200 | {"name": "NVIDIA Future", "major": arch[0], "minor": arch[1]})
    facts = live_device(_probe(torch=torch))
    assert facts.arch == f"sm_{arch[0]}{arch[1]}"
    assert facts.source.endswith(f"those of any {nearest}")
    assert facts.memory_gb_per_s == pytest.approx(4917, abs=1)


def _knobs(ptxas: str, blackwell: str = "/site/triton/backends/nvidia/bin/ptxas-blackwell") -> SimpleNamespace:
    tools = {
        "ptxas": SimpleNamespace(path=ptxas, version="12.9"),
        "ptxas_blackwell": SimpleNamespace(path=blackwell, version="13.0"),
    }
    return SimpleNamespace(nvidia=SimpleNamespace(**tools))


@pytest.mark.parametrize(
    ("knobs", "name"),
    [
        (_knobs("/site/triton/backends/nvidia/bin/ptxas"), "triton-3.6.0"),
        (_knobs("/usr/local/cuda/bin/ptxas"), "triton-3.6.0+ptxas12.9"),
        (_knobs("/usr/bin/ptxas", "/usr/bin/ptxas13"), "triton-3.6.0+ptxas12.9+ptxas-blackwell13.0"),
        (SimpleNamespace(nvidia=SimpleNamespace()), "triton-3.6.0"),
        (None, "triton-3.6.0"),
    ],
)
def test_a_foreign_ptxas_is_part_of_the_toolchain(knobs, name):
    assert toolchain(_loading(**{"triton.knobs": knobs})) == name


def test_no_triton_no_toolchain():
    with pytest.raises(MachineError, match="triton cannot be imported: ModuleNotFoundError"):
        toolchain(_loading(triton=None))


def test_the_commit_is_that_of_the_folder_and_says_when_files_differ(tmp_path):
    assert git_commit(tmp_path / "absent") is None

    def git(*args):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *args], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "one")
    git("tag", "-a", "v1", "-m", "a tag does not replace the commit")
    clean = git_commit(tmp_path)
    assert re.fullmatch(r"[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == f"{clean}-dirty"


def test_the_machine_that_is_here_can_be_probed():
    machine = probe()
    assert machine.python == ".".join(map(str, sys.version_info[:3]))
    assert machine.cores >= 1
    assert machine.triton.release >= (3, 6)
    assert bool(machine.gpus) != bool(machine.no_gpu)
    assert toolchain().startswith(f"triton-{machine.triton.version}")


def test_the_real_nvml_has_what_the_fake_one_has():
    nvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    fake = vars(fake_nvml(CurrentClocksThrottleReasons=0))
    assert [name for name in fake if not hasattr(nvml, name)] == []
    assert (nvml.NVML_CLOCK_SM, nvml.NVML_TEMPERATURE_GPU) == (1, 0)
    bits = {
        "power cap": nvml.nvmlClocksEventReasonSwPowerCap,
        "hardware slowdown": nvml.nvmlClocksEventReasonHwSlowdown,
        "sync boost": nvml.nvmlClocksEventReasonSyncBoost,
        "software thermal slowdown": nvml.nvmlClocksEventReasonSwThermalSlowdown,
        "hardware thermal slowdown": nvml.nvmlClocksThrottleReasonHwThermalSlowdown,
        "power brake": nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown,
    }
    assert {name: bit for bit, name in THROTTLING.items()} == bits


def test_without_nvml_the_kernel_says_which_driver_it_runs(tmp_path):
    text = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.03  Release Build\nGCC version: 12.2.0\n"
    (tmp_path / "proc").write_text(text)
    files = (tmp_path / "missing", tmp_path / "proc")
    assert driver_version(None, files) == "580.159.03"
    assert driver_version(None, files[:1]) is None
    assert driver_version(fake_nvml(), files) == "570.86.15"
