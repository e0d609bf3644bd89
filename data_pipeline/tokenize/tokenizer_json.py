"""Text tokenizers as the files that transformers' AutoTokenizer opens."""

import base64
import json
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import BOS, EOS, FIRST_IDS, PAD, SPECIAL_TOKENS
from data_pipeline.tokenize.kinds import huggingface
from data_pipeline.tokenize.kinds.bpe import BpeTokenizer
from data_pipeline.tokenize.pretrained_text import GOLDEN_TEXT, PretrainedText
from data_pipeline.tokenize.tokenizer import Tokenizer

CONFIG = "tokenizer_config.json"
_SPACE = "\u2581"
"""sentencepiece's mark of a space."""


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, Any]:
    """File name -> its JSON value. The tokenizer of these files gives <bos> and then the ids of a text.

    Raises ConfigError for a tokenizer that tokenizer.json cannot express, or without the package tokenizers.
    """
    try:
        if isinstance(tokenizer, BpeTokenizer):
            value, ids = _of_sentencepiece(tokenizer.model), FIRST_IDS
        elif isinstance(tokenizer, PretrainedText):
            ids = tokenizer.special_ids
            of_library = tokenizer.saved_name == huggingface.FILE
            value = json.loads(tokenizer.content) if of_library else _of_sentencepiece(tokenizer.content)
        else:
            raise ConfigError(f"{type(tokenizer).__name__} is no tokenizer that tokenizer.json can express")
        names = _add_special(value, ids)
        _check(value, tokenizer, ids)
    except ImportError as error:
        raise ConfigError(f'needs {error.name}: pip install "motley[tokenizers]"') from None
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": names[PAD],
        "bos_token": names[BOS],
        "eos_token": names[EOS],
        "clean_up_tokenization_spaces": False,
    }
    return {huggingface.FILE: value, CONFIG: config}


def _add_special(value: dict[str, Any], ids: tuple[int, ...]) -> list[str]:
    """Add SPECIAL_TOKENS of these ids to a tokenizer.json, in place, and let <bos> begin what it encodes.
    Returns their names in it."""
    added = {token["id"]: token for token in value.get("added_tokens") or []}
    for name, number in zip(SPECIAL_TOKENS, ids, strict=True):
        added.setdefault(number, _added(number, name))
    value["added_tokens"] = [added[number] for number in sorted(added)]
    names = [added[number]["content"] for number in ids]
    begin = {"SpecialToken": {"id": names[BOS], "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    begins = {"id": names[BOS], "ids": [ids[BOS]], "tokens": [names[BOS]]}
    value["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {names[BOS]: begins},
    }
    value["truncation"] = value["padding"] = None
    return names


def _added(number: int, name: str) -> dict[str, Any]:
    """An entry of a tokenizer.json's added tokens."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, **plain, "special": True}


def _of_sentencepiece(content: bytes) -> dict[str, Any]:
    """The tokenizer.json of a sentencepiece BPE model."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(content)
    trained, normal = model.trainer_spec, model.normalizer_spec
    if trained.model_type != trained.BPE:
        raise ConfigError("a sentencepiece model that is no BPE cannot become a tokenizer.json")
    vocab = {piece.piece: number for number, piece in enumerate(model.pieces)}
    of_file = enumerate(model.pieces)
    special = [_added(i, piece.piece) for i, piece in of_file if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    charsmap = base64.b64encode(normal.precompiled_charsmap).decode()
    normalizers: list[dict[str, Any]] = [{"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}]
    decoders = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if normal.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": _SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if normal.remove_extra_whitespaces:
        normalizers.insert(0, {"type": "Strip", "strip_left": True, "strip_right": True})
        normalizers.insert(1, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if charsmap:
        normalizers.insert(0, {"type": "Precompiled", "precompiled_charsmap": charsmap})
    bpe = {"type": "BPE", "dropout": None, "unk_token": trained.unk_piece, "fuse_unk": True}
    bpe |= {"byte_fallback": trained.byte_fallback, "ignore_merges": False}
    bpe |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {**bpe, "vocab": vocab, "merges": _merges(vocab, [p.score for p in model.pieces])},
    }


def _merges(vocab: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Pairs of pieces that join to a piece, the best score first, as sentencepiece joins them."""
    pairs = [
        (-scores[number], vocab[piece[:cut]], vocab[piece[cut:]], [piece[:cut], piece[cut:]])
        for piece, number in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [pair for *_, pair in sorted(pairs)]


def _check(value: dict[str, Any], tokenizer: Tokenizer, ids: tuple[int, ...]) -> None:
    """Raise ConfigError unless a tokenizer.json has the special tokens at these ids and gives the golden text
    the ids that `tokenizer` gives."""
    import tokenizers

    made = tokenizers.Tokenizer.from_str(json.dumps(value))
    made.encode_special_tokens = True
    names = {token["id"]: token["content"] for token in value["added_tokens"]}
    wrong = [names[number] for number in ids if made.token_to_id(names[number]) != number]
    if wrong:
        raise ConfigError(f"tokenizer.json cannot hold {', '.join(wrong)} at the ids of the data")
    if made.encode(GOLDEN_TEXT).ids != [ids[BOS], *tokenizer.encode(GOLDEN_TEXT).tolist()]:
        raise ConfigError("as a tokenizer.json it gives the golden text other ids than it gave the data")
