"""Peak matmul speed of GPUs by name, from data sheets. This module imports no torch."""

from types import MappingProxyType

from parallel.layout import Precision

# Vendor data sheets, FLOP/s without sparsity: (bf16 tensor core, fp32 outside tensor cores).
# First match of the device's name wins, so longer names come first.
PEAKS = MappingProxyType(
    {
        "H100 PCIe": (756e12, 51e12),
        "H100 NVL": (835e12, 60e12),
        "GH200": (989e12, 67e12),
        "H100": (989e12, 67e12),
        "H200": (989e12, 67e12),
        "B200": (2250e12, 80e12),
        "A100": (312e12, 19.5e12),
        "A40": (149.7e12, 37.4e12),
        "A10G": (70e12, 35e12),
        "A10": (125e12, 31.2e12),
        "L40S": (362e12, 91.6e12),
        "L40": (181e12, 90.5e12),
        "L4": (121e12, 30.3e12),
        "RTX 4090": (165.2e12, 82.6e12),
        "RTX 3090": (71e12, 35.6e12),
    }
)


def table_peak_flops(device_name: str, precision: Precision) -> float | None:
    """FLOP/s of one device by its name, or None if the table does not hold it."""
    for name, (bf16, fp32) in PEAKS.items():
        if name in device_name:
            return bf16 if precision == "bf16" else fp32
    return None
