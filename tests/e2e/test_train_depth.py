"""Runs with depth routing: metrics that tell what ran, and thresholds that a killed run takes up exactly."""

import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.metrics import read_rows
from tests.e2e.test_train_resume import MEASURED, last_step
from tests.e2e.warm import Run, train
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.toml_text import toml_text

DEPTH = {
    "schedule": "alternating", "mean_ratio": 0.75, "rule": "threshold", "dense_frac": 0.1, "ramp_frac": 0.3,
    "threshold_momentum": 0.8,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


EXPERTS = {
    "image": {
        "num_experts": 3,
        "routing": "token_choice",
        "top_k": 2,
        "load_balance": 0.01,
        "router_z": 0.001,
    },
    "speech": {"num_experts": 2},
}


def run_file(folder: Path, data: Path, experts: dict[str, Any] | None = None, **depth: Any) -> str:
    values = tiny_run(data, folder / "runs")
    values["model"] |= {"num_layers": 2, "depth": {"image": DEPTH | depth, "speech": DEPTH | depth}}
    if experts:
        values["model"]["experts"] = experts
        values["evaluate"] |= {"conditional_documents": 1, "last_documents": 8}
    values["every_steps"] |= {"eval": 12}
    values["optimizer"] |= {"ema_decay": 0.9}
    (folder / "tiny.toml").write_text(toml_text(values))
    return str(folder / "tiny.toml")


def curve(folder: Path) -> list[dict[str, Any]]:
    rows = read_rows(folder / "runs" / "tiny" / "metrics.jsonl")
    return [{n: v for n, v in row.items() if n.startswith((*MEASURED, "depth/", "experts/"))} for row in rows]


def kill_and_go_on(file: str, folder: Path) -> None:
    run = Run([file], folder / "out")
    run.wait_until(lambda: last_step(folder / "runs" / "tiny") >= 18)
    run.signal(signal.SIGKILL)
    assert run.codes() == [-signal.SIGKILL]
    train([file], folder / "out")


def test_a_killed_run_goes_on_with_its_thresholds(tmp_path: Path, data: Path) -> None:
    folders = [tmp_path / name for name in ("undisturbed", "killed", "two_ranks")]
    for folder in folders:
        folder.mkdir()
    undisturbed, killed, two_ranks = folders
    train([run_file(undisturbed, data)], undisturbed / "out")
    expected = curve(undisturbed)
    last = expected[-1]
    assert [name for name in last if name.startswith("depth/ratio")] == [
        "depth/ratio/image", "depth/ratio/image/1", "depth/ratio/speech", "depth/ratio/speech/1",
    ]  # fmt: skip
    assert expected[0]["depth/ratio/image/1"] == 1.0  # warm-up; then 0.5, of few tokens
    assert 0.35 < last["depth/ratio/image/1"] < 0.65 and last["depth/gate_std/image"] > 0
    assert not any(name.startswith("eval/causal") for row in expected for name in row)
    flops = [row["compute/train_flops"] / row["tokens"] for row in expected]
    assert flops[-1] < flops[0]

    kill_and_go_on(run_file(killed, data), killed)
    assert curve(killed) == expected

    train([run_file(two_ranks, data)], two_ranks / "out", processes=2)
    for one, two in zip(expected, curve(two_ranks), strict=True):
        # Counts of all ranks make one histogram, so thresholds, and who runs, are those of one process.
        for name in ("depth/ratio/image/1", "depth/ratio/speech/1", "compute/train_flops"):
            assert two[name] == one[name]
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)


def assert_evaluated_causally_too(last: dict[str, Any]) -> None:
    names = {name.removeprefix("eval/") for name in last if name.startswith("eval/")}
    causal = {name.replace("causal/", "") for name in names if "causal/" in name}
    assert causal and causal == {name for name in names if "causal/" not in name}
    raw = {name for name in causal if "ema/" not in name and not name.startswith("documents/")}
    assert raw == {name.removeprefix("ema/") for name in causal if name.startswith("ema/")}
    assert last["eval/ema/loss"] != last["eval/loss"] == pytest.approx(last["eval/ema/loss"], rel=0.05)
    assert last["eval/causal/loss"] != last["eval/loss"]
    assert last["eval/causal/loss"] == pytest.approx(last["eval/loss"], rel=0.1)


def test_a_killed_run_with_experts_among_the_tokens_that_run(tmp_path: Path, data: Path) -> None:
    """Thresholds of both kinds choose in eval/causal, of the average of weights too."""
    folders = [tmp_path / name for name in ("undisturbed", "killed", "stages")]
    for folder in folders:
        folder.mkdir()
    undisturbed, killed, stages = folders
    train([run_file(undisturbed, data, EXPERTS, rule="top_k")], undisturbed / "out")
    expected = curve(undisturbed)
    last = expected[-1]
    assert_evaluated_causally_too(last)
    assert 1 <= last["experts/load_balance/image"] < 3 and last["experts/router_z/image"] > 0
    assert "experts/router_z/speech" not in last and 0.35 < last["depth/ratio/speech/1"] < 0.65
    flops = [row["compute/train_flops"] / row["tokens"] for row in expected]
    assert flops[-1] < flops[0]

    kill_and_go_on(run_file(killed, data, EXPERTS, rule="top_k"), killed)
    assert curve(killed) == expected

    overrides = ["parallel.pp=2", "parallel.activation_checkpointing=true"]
    train([run_file(stages, data, EXPERTS, rule="top_k"), *overrides], stages / "out", processes=2)
    for one, two in zip(expected, curve(stages), strict=True):
        of_data = {name for name, value in one.items() if isinstance(value, str)}
        assert "data/fingerprint" in of_data and all(two[name] == one[name] for name in of_data)
        for name in one.keys() - of_data:
            # 2e-6 measured, of a tower's gradient norm; deviations of gates, differences of two numbers near
            # 1, are off by 2e-6.
            assert two[name] == pytest.approx(one[name], rel=1e-5, abs=1e-5), name
