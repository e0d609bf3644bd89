import pytest
import torch

from pretrain.train.device_peak import device_name, measure_peak_flops, peak_key

CPU = torch.device("cpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_measured_peak_is_that_of_a_processor(precision):
    # From an emulated core to one with a matrix unit: what matters is the unit, FLOP/s.
    assert 1e8 < measure_peak_flops(CPU, precision, seconds=0.02) < 1e14


def test_a_measured_peak_belongs_to_its_threads():
    assert device_name(CPU) == "cpu"
    assert peak_key(CPU, "fp32") == f"cpu, fp32, {torch.get_num_threads()} threads"
