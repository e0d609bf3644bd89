from data_pipeline.tokenize.media.pictures import PICTURES
from data_pipeline.tokenize.media.text import TEXT_MEDIUM
from data_pipeline.tokenize.media.waves import WAVES
from data_pipeline.tokenize.roundtrip import summary
from tests.data_pipeline.tokenize.test_documents import Letters

TOKENIZERS = {
    "text": Letters(9, TEXT_MEDIUM),
    "image": Letters(9, PICTURES),
    "speech": Letters(9, WAVES),
    "video": Letters(9, PICTURES),
}


def test_the_summary_says_how_much_and_how_well() -> None:
    manifest = {
        "num_documents": 10,
        "num_skipped": 1,
        "tokens": {"text": 60, "image": 40},
        "measured": {
            "text_bytes": 90,
            "text_tokens": 30,
            "pictures": 7,
            "decoded_pictures": 2,
            "decoded_values": 100,
            "decoded_squared_error": 6502.5,
            "speech_s": 3600.0,
            "speech_units": 72_000,
            "utterances": 9,
            "video.pictures": 5,
            "video.decoded_pictures": 1,
            "video.decoded_values": 100,
            "video.decoded_squared_error": 0.0,
        },
    }
    lines = summary("train", manifest, TOKENIZERS).splitlines()
    assert lines[0] == "train: 10 documents, 1 skipped, 100 tokens: text 60 (60%), image 40 (40%)"
    assert "3.00 bytes a token" in lines[1]
    assert "30.0 dB, over 2 of 7 pictures" in lines[2]
    assert "20.0 units a second, 1.00 h in 9 utterances" in lines[3]
    assert lines[4] == "  video: decode(encode(x)) is x, to the bit, over 1 of 5 pictures"
    assert len(summary("", {**manifest, "measured": {}}, TOKENIZERS).splitlines()) == 1
