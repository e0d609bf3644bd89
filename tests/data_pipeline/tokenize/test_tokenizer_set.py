from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import read_samples
from data_pipeline.tokenize.config import TokenizeConfig, load_tokenize_config
from data_pipeline.tokenize.raw import parse_document
from data_pipeline.tokenize.sources import find_splits
from data_pipeline.tokenize.tokenizer_set import load_tokenizers, obtain_tokenizers, vocabulary_of
from tests.data_pipeline.raw_documents import CONFIG, write_raw


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    write_raw(folder / "raw" / "train")
    write_raw(folder / "raw" / "heldout", shards=1, first=100)
    (folder / "data.toml").write_text(CONFIG)
    obtain_tokenizers(config(folder), find_splits(str(folder / "raw")), folder / "tokenizers", 2)
    return folder


def config(folder: Path, *overrides: str) -> TokenizeConfig:
    return load_tokenize_config(folder / "data.toml", overrides)


def test_tokenizers_are_fitted_once_in_the_order_of_the_vocabulary(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizers = load_tokenizers(raw / "tokenizers")
    assert list(tokenizers) == ["text", "image", "speech"]
    vocabulary = vocabulary_of(tokenizers)
    assert vocabulary.sizes == {name: tokenizer.size for name, tokenizer in tokenizers.items()}
    again = obtain_tokenizers(config(raw), find_splits(str(raw / "raw")), tmp_path / "again", 1)
    assert [t.fingerprint for t in again.values()] == [t.fingerprint for t in tokenizers.values()]
    # The few words and patches of this data make fewer codes than asked for, the tones do not.
    asked = {"text": 512, "image": 32, "speech": 16}
    fewer = [name for name, number in asked.items() if tokenizers[name].size < number]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert fewer == ["text", "image"] and len(lines) == 2
    for name, line in zip(fewer, lines, strict=True):
        size = tokenizers[name].size
        assert line.startswith(
            f"warning: {name}: the tokenizer has {size} codes where its table asks for {asked[name]}: "
        )
    gone = obtain_tokenizers(config(raw), [], raw / "tokenizers", 1)
    assert [t.fingerprint for t in gone.values()] == [t.fingerprint for t in tokenizers.values()]


def test_only_the_training_split_is_seen(raw: Path, tmp_path: Path) -> None:
    splits = [split for split in find_splits(str(raw / "raw")) if split.name == "train"]
    alone = obtain_tokenizers(config(raw), splits, tmp_path / "alone", 2)
    both = load_tokenizers(raw / "tokenizers")
    assert {n: t.fingerprint for n, t in alone.items()} == {n: t.fingerprint for n, t in both.items()}


def test_tokenizers_of_an_earlier_data_set_are_taken_over(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(f'tokenizers_from = "{raw / "tokenizers"}"')
    taken = obtain_tokenizers(config(tmp_path), [], tmp_path / "tokenizers", 1)
    ours = load_tokenizers(raw / "tokenizers")
    assert {n: t.fingerprint for n, t in taken.items()} == {n: t.fingerprint for n, t in ours.items()}
    assert load_tokenizers(tmp_path / "tokenizers").keys() == ours.keys()


def test_places_without_tokenizers_or_splits_are_said(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "data.toml").write_text(f'tokenizers_from = "{tmp_path}/none"')
    with pytest.raises(ConfigError, match="no tokenizers here"):
        obtain_tokenizers(config(tmp_path), [], tmp_path / "tokenizers", 1)
    with pytest.raises(
        ConfigError, match=r'fit_split = "training": SRC has no such folder .* heldout, train'
    ):
        obtain_tokenizers(
            config(raw, "fit_split=training"), find_splits(str(raw / "raw")), tmp_path / "tokenizers", 1
        )
    assert not (tmp_path / "tokenizers").exists()


def test_contents_pass_through_each_tokenizer(raw: Path) -> None:
    """The interface that prepare.py uses, on every modality alike."""
    tokenizers = load_tokenizers(raw / "tokenizers")
    _, sample = next(read_samples(raw / "raw" / "train" / "raw-00000.tar"))
    for part in parse_document(sample):
        tokenizer = tokenizers[part.modality]
        content = tokenizer.read(part.data)
        codes = tokenizer.encode(content)
        assert len(codes) and codes.min() >= 0 and codes.max() < tokenizer.size
        assert type(tokenizer.decode(codes)) is type(content)
