"""Which processor computes a run, and by which of its arithmetic paths.

Libraries choose their kernels by the processor, and kernels add in different orders. Training is therefore
bit for bit reproducible on one kind of processor and one path; on another it is another draw.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def processor(device: torch.device, cpuinfo: Path = CPUINFO) -> str | None:
    """The CPU's name, family and model where it computes; None where a GPU does, whose name is the
    device's."""
    if device.type == "cuda":
        return None
    facts: dict[str, str] = {}
    try:
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, colon, value = line.partition(":")
            if colon:
                facts.setdefault(key.strip(), value.strip())
    except OSError:  # no Linux
        return "unknown"
    # Virtual machines give many processors one name: family and model tell them apart.
    numbers = [f"{key} {facts[key]}" for key in ("cpu family", "model") if key in facts]
    name = facts.get("model name", "unknown")
    return f"{name} ({', '.join(numbers)})" if numbers else name


def arithmetic_path(device: torch.device, settings: Mapping[str, str]) -> str:
    """The instruction set of torch's kernels, and `settings` of the environment that choose others
    (parallel.launch.arithmetic_settings)."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"CUDA {torch.version.cuda}, compute capability {major}.{minor}"
    capability = torch.backends.cpu.get_cpu_capability()
    return ", ".join((capability, *(f"{name}={value}" for name, value in sorted(settings.items()))))
