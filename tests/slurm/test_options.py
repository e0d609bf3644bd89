from slurm.options import LEGAL, OWN_KEY


def test_an_option_is_legal_or_has_its_own_key() -> None:
    """What sbatch itself offers is compared in tests/slurm_cluster/."""
    assert not LEGAL & OWN_KEY.keys()
    assert {"exclusive", "constraint", "gres", "reservation"} <= LEGAL
