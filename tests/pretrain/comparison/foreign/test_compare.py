"""`motley compare --from`, from words to the page."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.foreign.compare import compare_logs
from pretrain.comparison.plan import ComparisonPlan


def test_run_directories_of_a_comparison_give_its_verdicts_again(
    synthetic_plan: Callable[..., ComparisonPlan],
    write_runs: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pretrain.comparison.findings import find
    from pretrain.comparison.report.files import summary
    from pretrain.comparison.results import load_results

    monkeypatch.chdir(tmp_path)
    plan = synthetic_plan()
    write_runs(plan, noise=0.004, multiplier=lambda arm, m: 1.4 if (arm, m) == ("mot", "image") else 1.0)
    ours = summary(find(plan, load_results(plan)))
    out = io.StringIO()
    assert compare_logs([str(plan.directory), "baseline=dense", "name=again"], to=out) == 0
    theirs = json.loads(Path("runs/again/report/summary.json").read_text())
    assert theirs["same_data"]["proven"]  # hashes travel with run directories
    for mine, found in zip(ours["contrasts"], theirs["contrasts"], strict=True):
        for key in ("modality", "winner", "outcome", "difference_nats", "interval_nats"):
            assert found[key] == mine[key], key
    assert "mot is better than dense on image" in out.getvalue()
    html = Path("runs/again/report/index.html").read_text()
    assert f"motley compare --from {plan.directory} baseline=dense name=again" in html
    assert sorted(p.name for p in Path("runs/again/report/tensorboard").iterdir()) == [
        f"{arm}_seed{seed}" for arm in ("dense", "mot") for seed in (1, 2, 3)
    ]


def test_no_log_and_the_directory_of_a_comparison_are_refused(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--from: no log is named"):
        compare_logs(["baseline=dense"])
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    own = f"runs_dir={plan.directory.parent}"
    with pytest.raises(ConfigError, match="whose report would be replaced; give this one another name"):
        compare_logs([str(plan.directory)], "baseline=dense", [own])
