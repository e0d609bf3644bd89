from pretrain.comparison.report.digest import digest_line


def test_another_summary_has_another_line() -> None:
    assert digest_line(b"a") == digest_line(b"a") != digest_line(b"b")
    assert digest_line(b"a").startswith("<!--") and digest_line(b"a").endswith("-->\n")
