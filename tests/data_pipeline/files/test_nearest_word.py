"""The legal word that is most like an unknown one."""

from data_pipeline.files.nearest_word import did_you_mean


def test_the_nearest_word_is_named_and_a_distant_one_is_not() -> None:
    assert did_you_mean("seeed", ["name", "seed"]) == '; did you mean "seed"?'
    assert did_you_mean("qqq", ["name", "seed"], otherwise=".") == "."
    assert did_you_mean("sede", ["seed"], cutoff=0.9) == ""
