from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from slurm.profile import Profile, load_profile

SHIPPED = sorted((Path(__file__).parents[2] / "slurm" / "profiles").glob("*.toml"))
GOOD = {"gpus_per_node": 4, "time_limit": "1:00:00"}


def profile(**changes: object) -> Profile:
    return validate(Profile, GOOD | changes, source="site.toml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_profiles_are_good(path: Path) -> None:
    assert load_profile(path).world_size >= 1
    assert load_profile(path, nodes=3).nodes == 3


def test_there_is_one_for_each_kind_of_site() -> None:
    assert {path.stem for path in SHIPPED} == {"generic", "modules", "pyxis", "apptainer", "test_cluster"}


def test_ranks_are_gpus_or_said() -> None:
    assert (profile().world_size, profile(nodes=3).world_size) == (4, 12)
    assert profile(gpus_per_node=0, tasks_per_node=2, nodes=2).world_size == 4
    assert profile(tasks_per_node=4).ranks_per_node == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patrition": "x"}, 'patrition: unknown key; did you mean "partition"? Legal here: account, '),
        ({"gpus_per_node": 0}, "gpus_per_node or tasks_per_node is required"),
        ({"tasks_per_node": 2}, "a rank drives one GPU; leave tasks_per_node out"),
        ({"nodes": 0}, "nodes = 0: Input should be greater than 0"),
        ({"time_limit": "soon"}, 'time_limit = "soon": a time limit is minutes, MM:SS, HH:MM:SS'),
        ({"time_limit": "0"}, "a time limit is minutes"),
        (
            {"time_limit": "2:00", "signal_lead_s": 120},
            "signal_lead_s = 120 is not less than time_limit = 2:00",
        ),
        (
            {"options": {"constrain": "x"}},
            'no option of sbatch; did you mean "constraint"? Legal: acctg-freq, bb',
        ),
        ({"options": {"wrap": "rm"}}, '"wrap" is no option of sbatch'),
        ({"options": {"time": "1"}}, '"time" is set by time_limit'),
        ({"options": {"exclusive": False}}, '"exclusive" = false: leave it out'),
        ({"nodes": 2, "min_nodes": 3}, "min_nodes = 3 is more than nodes = 2"),
        ({"chain": 3}, "chain = 3 with max_requeues = 10: a job goes on in the next of its chain or starts "),
        ({"preflight": {"enable": False}}, 'preflight.enable: unknown key; did you mean "enabled"?'),
        ({"env": {"A-B": "1"}}, '"A-B" is not the name of an environment variable'),
        ({"container": {"kind": "pyxis"}}, 'kind = "pyxis" needs an image'),
        ({"container": {"image": "x"}}, 'kind = "none" takes no image'),
        ({"container": {"kind": "docker", "image": "x"}}, "'none', 'pyxis' or 'apptainer'"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_legal(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        profile(**changes)
    assert str(error.value).startswith("site.toml: ") and message in str(error.value)


def test_what_slurm_may_give() -> None:
    assert list(profile(nodes=3).node_counts) == [3]
    assert list(profile(nodes=4, min_nodes=2).node_counts) == [2, 3, 4]
    assert profile(chain=3, max_requeues=0).chain == 3


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("3", 180), ("3:30", 210), ("1:02:03", 3723), ("2-3", 183_600), ("1-0:10", 87_000), ("1-0:0:9", 86_409)],
)
def test_limits_are_read_as_sbatch_reads_them(limit: str, seconds: int) -> None:
    """Its manual, --time. A lead of one second less is taken, of the limit itself is not."""
    lead = min(seconds - 1, 65_535)
    assert profile(time_limit=limit, signal_lead_s=lead).time_limit == limit
    if seconds <= 65_535:
        with pytest.raises(ConfigError, match=f"{seconds} s"):
            profile(time_limit=limit, signal_lead_s=seconds)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml: no such file"):
        load_profile(tmp_path / "nowhere.toml")
