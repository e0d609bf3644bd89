import pytest

from tools.bench.options import parse_options


def test_options_of_ones_own() -> None:
    options = parse_options("model", ["--layers", "0", "--rounds", "3"])
    assert (options.device, options.layers, options.rounds, options.d_model) == ("cpu", 0, 3, 512)


@pytest.mark.parametrize("verb", ["model", "sparse"])
def test_a_mistake_is_explained(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_options(verb, ["--rounds", "0"])
    said = capsys.readouterr().err
    assert f"motley bench {verb}: error: --rounds 0: at least 1 is needed" in said
