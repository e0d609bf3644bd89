from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.audit.steps import SpikeAt, consumed_steps, open_run, what_went
from tests.pretrain.audit.consumed_run import read_run, write_masked_data


def numbers(last_step: int, *spikes: SpikeAt) -> tuple[list[int], list[int]]:
    """(the run's number of each step of the data, those that are kept)."""
    went = what_went(last_step, spikes)
    return [step for step, _ in went], [step for step, is_kept in went if is_kept]


def test_steps_of_a_run_without_spikes_are_those_of_the_data() -> None:
    assert numbers(3) == ([1, 2, 3], [1, 2, 3]) and numbers(0) == ([], [])


def test_a_spike_is_left_out_or_leads_back() -> None:
    assert numbers(4, SpikeAt(2, None)) == ([1, 2, 3, 4], [1, 3, 4])
    assert numbers(6, SpikeAt(5, 3)) == ([1, 2, 3, 4, 5, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    twice = numbers(6, SpikeAt(5, 3), SpikeAt(5, 3))
    assert twice == ([1, 2, 3, 4, 5, 4, 5, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert numbers(3, SpikeAt(5, 3)) == ([1, 2, 3, 4, 5], [1, 2, 3]), "it went back and made no more steps"


def test_spikes_in_no_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="one at step 2 comes after step 3"):
        what_went(6, [SpikeAt(3, None), SpikeAt(2, None)])


def test_sequences_follow_each_other(tmp_path: Path) -> None:
    write_masked_data(tmp_path)
    run = open_run(read_run(tmp_path, tmp_path / "runs", steps=4))
    steps = list(consumed_steps(run, more=1))
    assert [step.first_sequence for step in steps] == [0, 4, 8, 12, 16]
    assert [step.went.step for step in steps] == [1, 2, 3, 4, 5]
    with pytest.raises(ConfigError, match="no run directory"):
        open_run(tmp_path)
