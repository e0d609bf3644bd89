"""What a record says of the processor."""

from pathlib import Path

import torch

from parallel.launch import arithmetic_settings
from pretrain.train.arithmetic import arithmetic_path, processor

CPU = torch.device("cpu")


def test_the_processor_by_name_family_and_model(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel name\t: another\n"
    )
    assert processor(CPU, cpuinfo) == "AMD EPYC (cpu family 25, model 17)"
    cpuinfo.write_text("Processor : 0\n")
    assert processor(CPU, cpuinfo) == "unknown"
    assert processor(CPU, tmp_path / "absent") == "unknown"
    assert processor(torch.device("cuda"), cpuinfo) is None


def test_the_path_names_what_the_environment_chose() -> None:
    here = torch.backends.cpu.get_cpu_capability()
    assert arithmetic_path(CPU, {}) == here
    settings = arithmetic_settings({"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "HOME": "/root"})
    assert arithmetic_path(CPU, settings) == f"{here}, ATEN_CPU_CAPABILITY=avx2, MKL_CBWR=AVX2"
