"""Text tokenizers of other libraries, trained on the spot on a few sentences: nothing is fetched."""

import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

TEXTS = [f"Return the {word} of item {i}.\n\n    >>> f({i})\n" for i in range(40) for word in ("sum", "size")]


def hugging_face_file(folder: Path, **changes: Any) -> Path:
    """folder/tokenizer.json: byte-level BPE that begins texts with <|begin|>. `changes`: of its fields."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|begin|>", "<|end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    value = json.loads(made.to_str())
    value["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(value | changes))
    return path


def sentencepiece_file(folder: Path, **settings: Any) -> Path:
    """folder/tokenizer.model, with `settings` of sentencepiece's trainer."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        **{"model_type": "bpe", "vocab_size": 350, "hard_vocab_limit": False, "minloglevel": 2} | settings,
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path
