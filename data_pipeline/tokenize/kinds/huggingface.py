"""Text <-> tokens of a tokenizer.json, the file of Hugging Face's tokenizers."""

import json

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.pretrained_text import Codec, pretrained_kind

FILE = "tokenizer.json"


def read_file(content: bytes) -> Codec:
    """The codec of a tokenizer.json. Raises ConfigError for one whose ids are drawn at random."""
    import tokenizers

    model = json.loads(content).get("model", {})
    if model.get("dropout"):
        raise ConfigError(
            f"model.dropout = {model['dropout']} makes its ids random; set it to null in the file"
        )
    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a text is text, and ends no document
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: number for number, token in added.items() if token.special}
    return Codec(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        num_ids=1 + max(tokenizer.get_vocab(with_added_tokens=True).values()),
        special_id=special.get,
        library=f"tokenizers {tokenizers.__version__}",
    )


TOKENIZER = pretrained_kind("huggingface", (FILE,), read_file, needs="tokenizers")
