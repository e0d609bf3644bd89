import math
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import load
from pretrain.planning.text import report

RUNS = Path(__file__).parents[3] / "pretrain/configs/runs"


def lines_of(run: str, *overrides: str, gpus: int, memory_gib: float | None = None, layouts: bool = False):
    return report(load(RUNS / run, overrides), gpus, memory_gib, layouts=layouts).splitlines()


def test_a_layout_is_shown_by_stage_tower_and_axis() -> None:
    lines = lines_of(
        "mot_7b.toml", "parallel.tp=2", "parallel.pp=4", "parallel.zero_stage=1", gpus=64, memory_gib=80
    )
    assert lines[0].startswith("mot_7b on 64 GPUs: tp 2 x pp 4 x dp 8, ZeRO-1, bf16; sequence parallel on")
    assert lines[1] == "48 micro-batches of 2 x 4096 tokens a step"
    heads = [line.split()[0] for line in lines if line]
    assert heads[3:7] == ["0", "1", "2", "3"]
    for name in ("shared", "text", "image", "speech", "tp:", "dp:", "pp:"):
        assert name in heads, name
    assert "fits into the 73.60 GiB" in lines[-1]
    for line in lines:
        cells = line.split()
        if cells[:1] == ["0"] or cells[:1] == ["text"]:
            parts = [float(cell) for cell in cells[-7 if cells[0] == "0" else -4 :]]
            assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.04), line


def test_a_ranking_says_how_many_fit_and_details_the_first() -> None:
    lines = lines_of("mot_7b.toml", gpus=16, memory_gib=80, layouts=True)
    assert " legal layouts, " in lines[0] and " of them within 73.60 GiB a GPU" in lines[0]
    tp, pp, dp = lines[3].split()[:3]
    assert any(line.startswith(f"mot_7b on 16 GPUs: tp {tp} x pp {pp} x dp {dp}") for line in lines)


def test_where_none_fits_the_least_is_named_with_what_to_change() -> None:
    text = "\n".join(lines_of("mot_7b.toml", gpus=2, memory_gib=80, layouts=True))
    assert ", 0 of them" in text
    assert "None fits. The least takes" in text and "Take more GPUs" in text
    assert "does not fit into" in text


def test_an_illegal_layout_is_one_message() -> None:
    with pytest.raises(ConfigError, match=r"with --gpus 64: parallel\.tp = 3 does not divide") as error:
        lines_of("mot_7b.toml", "parallel.tp=3", gpus=64)
    assert "`--layouts` shows the legal ones" in str(error.value)
    with pytest.raises(ConfigError, match="no layout of 67 GPUs is legal for 768 sequences"):
        lines_of("mot_7b.toml", gpus=67, layouts=True)


@pytest.mark.parametrize("layouts", [False, True])
@pytest.mark.parametrize("gpus", [0, -64])
def test_no_gpus_are_refused(gpus: int, layouts: bool) -> None:
    with pytest.raises(ConfigError, match=f"--gpus {gpus}: at least 1"):
        lines_of("mot_7b.toml", gpus=gpus, layouts=layouts)


@pytest.mark.parametrize("memory_gib", [0.0, -5.0, math.nan, math.inf])
def test_no_memory_is_refused(memory_gib: float) -> None:
    with pytest.raises(ConfigError, match=f"--gpu-memory-gib {memory_gib}: more than 0"):
        lines_of("mot_7b.toml", gpus=64, memory_gib=memory_gib)


def test_more_gpus_than_there_are_is_an_answer() -> None:
    """In no time: 10^12 trial divisions would never end."""
    with pytest.raises(ConfigError, match="no layout of 1000000000000 GPUs is legal"):
        lines_of("mot_7b.toml", gpus=10**12, layouts=True)


def test_depth_routing_is_told_with_and_without_tokens_that_skip() -> None:
    lines = lines_of("demo_pmod.toml", gpus=1)
    (told,) = (line for line in lines if line.startswith("activations are those of micro-batches in which"))
    after = float(told.split("; ")[1].split()[0])
    kept = next(float(line.split()[6]) for line in lines if line.split()[:1] == ["0"])
    assert 0 < after < kept
