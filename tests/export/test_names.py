"""Every consumer has its own way to write the name of a GPU."""

import pytest

from harness.export import fla, flashinfer_bench, hf_kernel, rows
from harness.probe import products_of

GOLDEN = {
    "NVIDIA H200": ("NVIDIA_H200", "NVIDIA_H200", "nvidia-h200"),
    "NVIDIA H100 80GB HBM3": ("NVIDIA_H100_80GB_HBM3", "NVIDIA_H100_80GB_HBM3", "nvidia-h100-80gb-hbm3"),
    "NVIDIA A100-SXM4-80GB": ("NVIDIA_A100_SXM4_80GB", "NVIDIA_A100-SXM4-80GB", "nvidia-a100-sxm4-80gb"),
    "AMD Instinct MI300X": ("AMD_Instinct_MI300X", "AMD_Instinct_MI300X", "amd-instinct-mi300x"),
    "NVIDIA GeForce RTX 4090": ("NVIDIA_GeForce_RTX_4090", "NVIDIA_GeForce_RTX_4090", "nvidia-geforce-rtx-4090"),
}


@pytest.mark.parametrize("product", GOLDEN)
def test_the_name_of_a_gpu(product: str) -> None:
    assert (fla.folder_name(product), flashinfer_bench.hardware_name(product), rows.device_name(product)) == GOLDEN[
        product
    ]


def test_the_file_of_a_hugging_face_package() -> None:
    assert hf_kernel.file_name("flash_fwd", "h200") == "kernel=flash_fwd,device_name=NVIDIA_H200.json"
    assert hf_kernel.file_name("flash_bwd", "a100") == "kernel=flash_bwd,device_name=NVIDIA_A100-SXM4-80GB.json"
    # A device that has no published figures is named by a slug of its product.
    assert hf_kernel.file_name("flash_fwd", "nvidia-l4") == "kernel=flash_fwd,device_name=nvidia-l4.json"


def test_drivers_call_a_device_by_these_names() -> None:
    assert products_of("mi300x") == ("AMD Instinct MI300X", "AMD Instinct MI300X OAM")
    assert products_of("nvidia-l4") == ()


def test_an_empty_name_is_no_folder() -> None:
    assert fla.folder_name("---") == "unknown_gpu"
