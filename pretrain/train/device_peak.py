"""Peak matmul speed of a device, the denominator of MFU, measured where no data sheet tells it."""

import time

import torch

from parallel.layout import Precision


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
