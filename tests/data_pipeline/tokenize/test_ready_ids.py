"""Ready-made ids: arrays, and the files that megatron-core itself writes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.tokenize import ready_ids
from data_pipeline.tokenize.ready_ids import import_tokens, read_documents
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from tests.data_pipeline.tokenize.tiny_text_tokenizers import hugging_face_file

END = 2
"""The id of <|endoftext|> in the tiny tokenizer."""
DOCUMENTS = [[7, 8, 9], [250], [100, 101, 102, 103], [30, 31]]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "data.toml"
    file = hugging_face_file(tmp_path / "file")
    path.write_text(f'[text]\nkind = "huggingface"\nfile = "{file}"\neos = "<|endoftext|>"\n')
    return path


def write_megatron(path: Path, dtype: type, *, end: bool = True) -> None:
    """The first document is of two sequences, as of sentences; an empty document follows it."""
    builder = IndexedDatasetBuilder(str(path), dtype=dtype)
    for document in ([DOCUMENTS[0][:2], DOCUMENTS[0][2:]], [[]], *([document] for document in DOCUMENTS[1:])):
        tail = [END] * end
        for number, sequence in enumerate(document):
            ids = sequence + (tail if number == len(document) - 1 else [])
            builder.add_item(torch.tensor(ids, dtype=torch.int64))
        builder.end_document()
    builder.finalize(str(path.with_suffix(".idx")))


def found_in(folder: Path) -> list[list[int]]:
    """The ids of all documents, without those around them."""
    source = TokenSource.open(folder)
    documents = [source.read(number).tolist() for number in range(source.num_documents)]
    assert all((ids[0], ids[-1]) == (source.vocabulary.bos, END) for ids in documents)
    return [ids[1:-1] for ids in documents]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_what_megatron_writes_is_read(dtype: type, config: Path, tmp_path: Path) -> None:
    write_megatron(tmp_path / "corpus_text_document.bin", dtype)
    import_tokens(tmp_path / "corpus_text_document", tmp_path / "out", config_path=config, end=END)
    assert found_in(tmp_path / "out") == DOCUMENTS
    text = load_tokenizers(tmp_path / "out/tokenizers")["text"]
    assert TokenSource.open(tmp_path / "out").fingerprints == {"text": text.fingerprint}


def test_arrays_are_rows_or_end_at_an_id(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ready_ids, "DOCUMENTS_PER_SHARD", 3)
    monkeypatch.setattr(ready_ids, "_SCANNED", 4)
    (tmp_path / "ids").mkdir()
    flat = [i for document in DOCUMENTS for i in (*document, END)]
    np.save(tmp_path / "ids/a.npy", np.array(flat, np.uint16))
    np.save(tmp_path / "ids/b.npy", np.array([[5, 6, END], [7, 8, 9]]))
    manifest = import_tokens(tmp_path / "ids", tmp_path / "out", config_path=config, end=END)
    assert found_in(tmp_path / "out") == [*DOCUMENTS, [5, 6], [7, 8, 9]]
    assert [shard["documents"] for shard in manifest["shards"]] == [3, 3]
    assert manifest["tokens"] == {"text": sum(len(d) + 2 for d in DOCUMENTS) + 4 + 5}


def test_a_document_that_begins_with_bos_has_one(config: Path, tmp_path: Path) -> None:
    config.write_text(config.read_text() + 'bos = "<|begin|>"\n')
    np.save(tmp_path / "a.npy", np.array([[0, 5, END], [0, END, END]]))
    with pytest.raises(ConfigError, match="document 1 holds the special token 2 within its text"):
        import_tokens(tmp_path / "a.npy", tmp_path / "out", config_path=config, end=END)
    np.save(tmp_path / "a.npy", np.array([0, 5, END, 0, END, 5, 6, END]))
    import_tokens(tmp_path / "a.npy", tmp_path / "out", config_path=config, end=END)
    assert found_in(tmp_path / "out") == [[5], [5, 6]]


def test_other_ids_and_other_files_are_refused(config: Path, tmp_path: Path) -> None:
    wide, within, odd = (tmp_path / f"{name}.npy" for name in ("wide", "within", "odd"))
    np.save(wide, np.array([[5, 300]]))
    np.save(within, np.array([[5, END, 6]]))
    np.save(odd, np.zeros((2, 2)))
    own = tmp_path / "own.toml"
    own.write_text("[text]\n")
    (tmp_path / "bad.bin").write_bytes(b"")
    (tmp_path / "bad.idx").write_bytes(b"MMIDIDX\0\0" + bytes(25))
    for src, end, toml, message in (
        (wide, None, config, r"document 0 holds the id 300; the text tokenizer has 0 \.\.\. 299"),
        (within, None, config, r"holds the special token 2 within its text; .* say --end 2"),
        (odd, None, config, r"of float64; legal: 1-D or 2-D, of integers"),
        (wide, 400, config, r"--end 400: the text tokenizer has"),
        (wide, None, own, r"tokenizers of text are fitted on documents"),
        (tmp_path / "bad.bin", None, config, r"bad\.idx: no index of Megatron-LM"),
        (tmp_path / "nope", None, config, r"nope: no \.npy, and no \.bin"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_tokens(src, tmp_path / "out", config_path=toml, end=end)
        assert not (tmp_path / "out").exists()
    np.save(tmp_path / "flat.npy", np.array([1, 2]))
    with pytest.raises(ConfigError, match="an id that --end names"):
        list(read_documents(tmp_path / "flat.npy", None))
