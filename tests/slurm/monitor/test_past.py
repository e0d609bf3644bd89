"""What `motley status` says of a run's trunk and of its changes."""

import io
import json
from pathlib import Path

from pretrain.lineage.begin import Ask, beginning
from pretrain.run_files import RECORD
from slurm.monitor.past import past
from slurm.monitor.status import status
from tests.pretrain.lineage.made_run import STEP_TOKENS, make_run, run_config


def test_a_runs_trunk_and_its_changes_are_told(tmp_path: Path) -> None:
    trunk = make_run(run_config(tmp_path, schedule={"kind": "wsd"}), [10, 20])
    assert past(trunk) == []
    longer = f"total_tokens={40 * STEP_TOKENS}"
    beginning(trunk, [longer], Ask(branch="b", from_step=10)).prepare()
    beginning(trunk, [longer], Ask(extend=True)).prepare()
    beginning(trunk, [], Ask(from_step=10)).prepare()
    assert past(trunk) == [
        "extended: total_tokens = 5120, from step 10 on; set aside in checkpoints/aside_1: 1,280 tokens, "
        "10.0 MFLOP",
        "back to step 10",
    ]
    identity = json.loads((trunk / RECORD).read_text())["run"]["id"]
    told = (
        f"a branch of {trunk} (run {identity}) at step 10; inherited 1,280 tokens, 10.0 MFLOP; own 0 tokens, "
        "0.00 FLOP"
    )
    assert past(tmp_path / "b") == [told]
    page = io.StringIO()
    status([tmp_path / "b"], to=page)
    assert f"  past        {told}" in page.getvalue().splitlines()
    (trunk / RECORD).write_text('{"attempts": 3}')
    assert "attempts: a whole number, should be a list" in past(trunk)[0]
