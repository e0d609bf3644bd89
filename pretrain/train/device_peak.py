"""Peak matmul speed of a device, the denominator of MFU: from a table of GPUs, measured elsewhere."""

import time
from types import MappingProxyType

import torch

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


def device_name(device: torch.device) -> str:
    """What record.json calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_key(device: torch.device, precision: Precision) -> str:
    """Name of a measured peak in record.json: what it depends on."""
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return f"{device_name(device)}, {precision}{threads}"


def measure_peak_flops(device: torch.device, precision: Precision, *, seconds: float = 0.2) -> float:
    """FLOP/s of the best of a row of square matmuls, for a device that has no entry in the table."""
    size = 512 if device.type == "cpu" else 4096
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
