import resource
from unittest import mock

import pytest
import torch
from train_helpers import tiny_model

from sevenfold.models.accounting import training_flops
from sevenfold.train.speed import FlopsCounter, known_peak_flops, peak_memory_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_flops_of_a_step_are_those_of_its_documents() -> None:
    config = tiny_model().config
    counter = FlopsCounter(config)
    assert counter.count((3, 9, 3)) == training_flops(config, (3, 9, 3))
    assert counter.count((9,)) == training_flops(config, (9,))
    assert counter.count((12,)) > counter.count((3, 9))


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Quadro", None),
    ],
)
def test_peaks_go_by_the_device_and_its_precision(name: str, peak: float | None) -> None:
    with mock.patch("torch.cuda.get_device_name", return_value=name):
        assert known_peak_flops(CUDA, "bf16") == peak
        assert known_peak_flops(CUDA, None) is None
        assert known_peak_flops(CPU, "bf16") is None


def test_memory_on_a_cpu_is_the_processs_peak() -> None:
    with mock.patch("sevenfold.train.speed.sys.platform", "linux"):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        assert peak_memory_bytes(CPU) >= before > 50_000_000
    with mock.patch("sevenfold.train.speed.sys.platform", "darwin"):
        assert peak_memory_bytes(CPU) * 1024 >= before
