import numpy as np

from data_pipeline.tokenize.roundtrip import picture_page, summary


def test_originals_stand_above_what_was_decoded() -> None:
    pairs = [
        (np.full((32, 32, 3), 10 * i, np.uint8), np.full((32, 32, 3), 10 * i + 5, np.uint8)) for i in range(3)
    ]
    page = picture_page(pairs)
    side = 32 * 4 + 2 * 4
    assert page.shape == (2 * side, 3 * side, 3)
    for column in range(3):
        assert (page[4 : side - 4, column * side + 4 : (column + 1) * side - 4] == 10 * column).all()
        assert (page[side + 4 : -4, column * side + 4 : (column + 1) * side - 4] == 10 * column + 5).all()


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
        },
    }
    lines = summary("train", manifest).splitlines()
    assert lines[0] == "train: 10 documents, 1 skipped, 100 tokens: text 60 (60%), image 40 (40%)"
    assert "3.00 bytes a token" in lines[1]
    assert "30.0 dB, over 2 of 7 pictures" in lines[2]
    assert "20.0 units a second, 1.00 h in 9 utterances" in lines[3]
    assert len(summary("", {**manifest, "measured": {}}).splitlines()) == 1
