"""What a comparison will cost."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.matched_flops import expected_mix, step_flops
from pretrain.comparison.planned_cost import UNTIMED, RunSpeed, cost_text, run_speed
from pretrain.comparison.run import run_comparison
from pretrain.quantities import flops
from tests.pretrain.comparison.ladder_files import ladder_edit
from tests.pretrain.tiny_data import write_tiny_data


def with_data(text: str, folder: Path) -> str:
    """The base run over the tiny data in a folder, whose vocabulary is small enough."""
    return text.replace(f"{folder}/runs/tokens", str(folder / "tiny")).replace("= 256", "= 64")


@pytest.fixture
def plan(comparison_files: Callable[..., Any], tmp_path: Path) -> Any:
    write_tiny_data(tmp_path / "tiny")
    files = comparison_files(base_edit=lambda text: with_data(text, tmp_path), edit=ladder_edit())
    return make_plan(files.comparison)


def test_every_run_is_listed_with_its_flops_and_hours(plan: Any) -> None:
    mix = expected_mix(plan.runs[0].config)
    total = sum(run.config.num_steps * step_flops(run.config, mix) for run in plan.runs)
    text = cost_text(plan, RunSpeed(flops_per_s=1e9), concurrent_runs=2)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["cell", "arm", "seeds", "steps"]
    assert [line.split()[:3] for line in lines[1:3]] == [["d32_2tpp", "dense", "3"], ["d32_2tpp", "mot", "3"]]
    assert len(lines) == 1 + 10 + 1 + 2
    assert lines[12].startswith(f"30 runs: {flops(float(total))}, ")
    assert f"; {float(total) / 1e9 / 3600:.3g} hours of a rank" in lines[12]
    assert lines[13].startswith(f"one more seed: 10 runs, {flops(float(total / 3))}")
    out = io.StringIO()
    assert run_comparison(plan.path, speed=RunSpeed(flops_per_s=1e9), dry_run=True, to=out) == 0
    assert text.splitlines()[0] in out.getvalue() and "Likely to be seen (80 % chance, 15 " in out.getvalue()
    assert not plan.directory.exists()
    assert cost_text(plan, None, 2).endswith("hours: unknown; --flops-per-s, or --gpu with --mfu, tells them")


def test_a_speed_is_measured_or_a_share_of_a_peak(plan: Any) -> None:
    config = plan.runs[0].config
    assert run_speed(None, None, None, needs_dry_run=True) is None
    measured, of_gpu = (
        run_speed(4e14, None, None, needs_dry_run=False),
        run_speed(None, "H100", 0.4, needs_dry_run=False),
    )
    assert measured is not None and measured.of(config) == 4e14
    assert of_gpu is not None and of_gpu.of(config) == pytest.approx(0.4 * 67e12)  # fp32
    assert of_gpu.of(config.model_copy(update={"precision": "bf16"})) == pytest.approx(0.4 * 989e12)
    for arguments, message in (
        ((4e14, "H100", 0.4), "not both"),
        ((None, "H100", None), "--gpu needs --mfu"),
        ((None, "H1000", 0.4), "not in the table; legal: H100 PCIe, "),
        ((None, "H100", 1.4), "--mfu 1.4: expected a share above 0"),
        ((-1.0, None, None), "--flops-per-s -1"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_speed(*arguments, needs_dry_run=False)
    with pytest.raises(ConfigError, match="tell the hours of --dry-run"):
        run_speed(4e14, None, None, needs_dry_run=True)


def test_steps_that_timing_rounds_will_give_are_not_told_as_known(
    comparison_files: Callable[..., Any], tmp_path: Path
) -> None:
    write_tiny_data(tmp_path / "tiny")
    files = comparison_files(
        base_edit=lambda text: with_data(text, tmp_path), edit=lambda text: 'match = "seconds"\n' + text
    )
    text = cost_text(make_plan(files.comparison), None, concurrent_runs=1)
    assert UNTIMED in text
