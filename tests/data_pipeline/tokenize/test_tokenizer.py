from data_pipeline.tokenize.tokenizer import fingerprint_of


def test_a_fingerprint_depends_on_settings_and_on_each_content() -> None:
    prints = [
        fingerprint_of({"a": 1, "b": 2}, b"x", b"y"),
        fingerprint_of({"a": 1, "b": 3}, b"x", b"y"),
        fingerprint_of({"a": 1, "b": 2}, b"xy"),
        fingerprint_of({"a": 1, "b": 2}, b"y", b"x"),
    ]
    assert len(set(prints)) == 4
    assert fingerprint_of({"b": 2, "a": 1}, b"x", b"y") == prints[0]
    assert all(len(hexadecimal) == 16 for hexadecimal in prints)
