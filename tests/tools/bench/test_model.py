import pytest
import torch

from tools.bench.model import BASELINE, Case, Row, measure, table, variants
from tools.cli import main

TINY = Case(num_layers=1, d_model=16, num_heads=2, sequences=2, context_tokens=32, vocab_tokens=24)


def test_every_variant_is_timed_and_set_against_dense() -> None:
    device = torch.device("cpu")
    rows = measure(TINY.label, variants(TINY, device), device, rounds=3)
    assert [row.variant for row in rows] == [
        BASELINE, "mot, 2 towers", "published, 2 towers", "mot, 3 towers", "published, 3 towers",
    ]  # fmt: skip
    assert rows[0].ratio == 1.0 and rows[0].ratio_spread == (1.0, 1.0)
    assert all(row.median_ms > 0 and row.spread_ms[0] <= row.median_ms <= row.spread_ms[1] for row in rows)


def test_gradients_are_dropped_after_each_pass() -> None:
    """Else one pass would add into the gradients of the one before."""
    for run in variants(TINY, torch.device("cpu")).values():
        run()
        captured = [cell.cell_contents for cell in run.__closure__ or ()]
        modules = [value for value in captured if isinstance(value, torch.nn.Module)]
        assert modules
        assert all(parameter.grad is None for module in modules for parameter in module.parameters())


def test_table_aligns() -> None:
    row = Row("mot, 3 towers", 531.25, (500.0, 640.5), 1.021, (1.0, 1.1))
    head, line = table([row]).splitlines()
    assert len(head) == len(line)
    assert "531.25" in line and "1.021" in line


@pytest.mark.parametrize(("verb", "variant"), [("model", "mot, 3 towers"), ("sparse", "experts, 2 of 4")])
def test_a_case_of_ones_own(verb: str, variant: str, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        arguments = "--rounds 1 --layers 0 --d-model 16 --heads 2 --sequences 1 --context 32 --vocabulary 24"
        assert main(["bench", verb, *arguments.split()]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    assert "block, d_model 16, 1 x 32 tokens" in out and variant in out


def test_a_device_that_is_not_there_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has what the test wants to be missing")
    assert main(["bench", "sparse", "--device", "cuda"]) == 2
    assert "--device cuda: torch finds no CUDA device here; use --device cpu" in capsys.readouterr().err
