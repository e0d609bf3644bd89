import pytest
import torch

from pretrain.train.device_peak import PEAKS, device_name, measure_peak_flops, peak_key, table_peak_flops

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("cpu", None),
        ("Some GPU of 2031", None),
    ],
)
def test_a_device_is_found_by_the_longest_name(name: str, bf16: float | None):
    assert table_peak_flops(name, "bf16") == bf16


def test_no_entry_hides_one_below_it():
    for name, (bf16, fp32) in PEAKS.items():
        assert (table_peak_flops(f"NVIDIA {name}", "bf16"), table_peak_flops(name, "fp32")) == (bf16, fp32)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measured_peak_is_that_of_a_processor(precision):
    # From an emulated core to one with a matrix unit: what matters is the unit, FLOP/s.
    assert 1e8 < measure_peak_flops(CPU, precision, seconds=0.02) < 1e14


def test_a_measured_peak_belongs_to_its_threads():
    assert device_name(CPU) == "cpu"
    assert peak_key(CPU, "fp32") == f"cpu, fp32, {torch.get_num_threads()} threads"
