import pytest

from data_pipeline.remote.location import (
    check_folder,
    command_of,
    file_url,
    shown,
    shown_file,
    without_queries,
)
from data_pipeline.shards.tar import Url


@pytest.mark.parametrize(
    "text",
    [
        "data/train",
        "C:odd name",
        "file:///data/train",
        "https://host:8000/tokens",
        "http://host/tokens?sig=x",
        "s3://bucket/tokens",
        "gs://bucket/tokens",
        "pipe:cat /data/{}",
    ],
)
def test_what_may_be_typed(text: str) -> None:
    check_folder(text)


@pytest.mark.parametrize(
    "text, expected",
    [
        (
            "ftp://host/tokens",
            r"no reader for ftp://; legal: http://, https://, s3://, gs://, pipe:COMMAND, or a",
        ),
        (
            "pipe:cat /data/all.tar",
            r"must say \{\} where the name of a file belongs, such as .pipe:aws s3 cp",
        ),
        ("https://host/a b?sig=secret", r"'https://host/a b': a URL has no spaces; write them, and what is"),
        (
            "https://me:secret@host/tokens",
            r"^https://host/tokens: a name or a password in a URL would stand in",
        ),
    ],
)
def test_what_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected) as error:
        check_folder(text)
    assert "secret" not in str(error.value)


def test_a_signature_is_sent_and_not_shown() -> None:
    folder = Url("https://host/tokens/?sig=SECRET&e=1")
    assert file_url(folder, "a b#1.tar") == "https://host/tokens/a%20b%231.tar?sig=SECRET&e=1"
    assert shown(folder) == "https://host/tokens"
    assert shown_file(folder, "index.bin") == "https://host/tokens/index.bin"
    text = f'data.heldout="{folder.text}" data.train=[{{path = "S3://b/a?v=SECRET"}}] why?'
    assert (
        without_queries(text) == 'data.heldout="https://host/tokens/" data.train=[{path = "S3://b/a"}] why?'
    )
    assert file_url(Url("s3://bucket/tokens"), "a b.tar") == "s3://bucket/tokens/a b.tar"


def test_a_name_enters_a_command_as_it_is_or_not_at_all() -> None:
    folder = Url('pipe:cat "/data/{}"')
    assert command_of(folder.text) == 'cat "/data/{}"' and command_of("s3://a/b") is None
    assert file_url(folder, "tokens-00001.tar") == 'pipe:cat "/data/tokens-00001.tar"'
    assert shown_file(folder, "index.bin") == 'pipe:cat "/data/index.bin"'
    for name in (
        "$(touch x).tar",
        "a;b",
        "a b",
        "-rf",
        "`id`",
        'a"b',
        "a'b",
        "ä.tar",
        "a\nb",
        "",
    ):
        with pytest.raises(ValueError, match="has a name that no command is given"):
            file_url(folder, name)
