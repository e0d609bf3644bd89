import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import tokenize_config

VIDEO = "tests.data_pipeline.video_tokenizer"


def problem(values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        tokenize_config(values, "data.toml")
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "[text] is needed"),
        ({"text": {"vocab_sise": 900}}, 'text.vocab_sise: unknown key; did you mean "vocab_size"?'),
        ({"text": {}, "immage": {}}, 'immage: unknown key; did you mean "image"?'),
        ({"text": {"vocab_size": 100}}, "text.vocab_size = 100"),
        ({"text": {}, "image": {"size_px": 30}}, "size_px = 30 is not a multiple of patch_px = 4"),
        ({"text": {}, "image": {"num_codes": 8}}, "num_verbatim = 32 is more than num_codes = 8"),
        ({"text": {}, "speech": {"units_per_s": 7}}, "must divide 16000"),
        ({"text": {}, "max_bad_frac": 2}, "max_bad_frac = 2"),
        (
            {"text": {}, "image": {"kind": "vqgan"}},
            'data.toml: image.kind = "vqgan": no such tokenizer of image; legal: "patch_kmeans", "patches", '
            "the dotted path of a module that defines TOKENIZER",
        ),
        ({"text": {"kind": "patch_kmeans"}}, 'text.kind = "patch_kmeans": no such tokenizer of text'),
        (
            {"text": {}, "video": {"kind": "video"}},
            'video.kind = "video": no such tokenizer of video; legal:',
        ),
        ({"text": {}, "video": {"kind": "no.such"}}, "no.such cannot be imported (No module named 'no')"),
        ({"text": {}, "video": {"kind": "os.path"}}, "os.path defines no TOKENIZER"),
        ({"text": {}, "video": {"kind": VIDEO, "num_code": 1}}, "video.num_code: unknown key; did you mean"),
        ({"text": {}, "My-Video": {"kind": VIDEO}}, "My-Video: a modality is named with small letters"),
        ({"text": {}, "tokenizers_from": "x"}, "brings its own settings; remove the tables ['text']"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    assert message in problem(values)


def test_tables_say_which_modalities_there_are() -> None:
    config = tokenize_config({"speech": {}, "text": {}}, "data.toml")
    assert list(config.tables) == ["text", "speech"]


def test_a_table_without_a_kind_takes_the_default_and_naming_it_changes_nothing() -> None:
    implied = tokenize_config({"text": {}, "image": {"num_codes": 64}}, "data.toml")
    named = tokenize_config(
        {"text": {"kind": "bpe"}, "image": {"kind": "patch_kmeans", "num_codes": 64}}, "data.toml"
    )
    assert implied == named and implied.values() == named.values()
    assert implied.tables["image"].kind == "patch_kmeans" and implied.values()["image"]["num_codes"] == 64


def test_further_modalities_follow_by_name_and_say_their_kind() -> None:
    further = {"kind": VIDEO, "num_codes": 5}
    config = tokenize_config({"video": further, "text": {}, "audio": further, "speech": {}}, "data.toml")
    assert list(config.tables) == ["text", "speech", "audio", "video"]
    assert config.values()["video"] == further


def test_all_mistakes_are_listed() -> None:
    message = problem({"text": {"vocab_size": 1}, "image": {"kind": 3}, "seed": -1})
    assert [line.split(": ")[1].split(" ")[0] for line in message.splitlines()] == [
        "text.vocab_size",
        "image.kind",
        "seed",
    ]
