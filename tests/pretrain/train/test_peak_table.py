import pytest

from pretrain.train.peak_table import PEAKS, table_peak_flops


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
