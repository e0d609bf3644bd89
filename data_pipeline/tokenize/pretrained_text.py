"""Text tokenizers that were trained elsewhere: files that keep their ids, with special tokens behind them.

    file                  0 .. n - 1     ids of the file
    special tokens        n .. n + 6     those of <pad> <bos> <eos> <boi> ... that the file does not hold

A kind of such tokenizers is a module in kinds/ that says how a library reads the file (`Codec`).
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from data_pipeline.files.atomic import atomic_file, write_json
from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import SPECIAL_TOKENS
from data_pipeline.tokenize.media.text import TEXT_MEDIUM, read_text
from data_pipeline.tokenize.tokenizer import Medium, TokenizerConfig, TokenizerKind, fingerprint_of

GOLDEN = "golden.json"
GOLDEN_TEXT = (
    "Motley's 3 models, e.g. mot-7B: 12,345.67 tokens/s (50 %)?\n\tdef f(x):  return x**2  # na\u00efve "
    "\u00dcber \u0416\u0443\u043a \u6771\u4eac\u306e\u7a7a \u0645\u0631\u062d\u0628\u0627 "
    "\U0001f642\u200d\u2194\ufe0f e\u0301 <|endoftext|> </s>\r\n  The END.  "
)
"""Text whose ids every machine compares before it tokenizes: words, numbers, code, accents, several scripts,
an emoji of several characters, and strings that look like special tokens. Fingerprints depend on it, so it
stays as it is.
"""


class PretrainedConfig(TokenizerConfig):
    """Settings of a text tokenizer that was trained elsewhere."""

    file: str = Field(min_length=1)
    """The file, or a folder that holds it under its usual name."""
    pad: str = "<pad>"
    """Special token of the file that fills sequences up; one that is added where the file has no <pad>."""
    bos: str = "<bos>"
    """Special token of the file that begins every document, such as "<|begin_of_text|>"; added likewise."""
    eos: str = "<eos>"
    """Special token of the file that ends every document, such as "<|end_of_text|>"; added likewise."""


@dataclass(frozen=True)
class Codec:
    """The functions and numbers that a library makes of a tokenizer's file."""

    encode: Callable[[str], list[int]]
    """Ids of a text, which holds no special tokens: a string that looks like one is text."""
    decode: Callable[[list[int]], str]
    num_ids: int
    """The highest id, and one."""
    special_id: Callable[[str], int | None]
    """Id of a special token of the file, which no text becomes; None for any other string."""
    library: str
    """Name and version."""


@dataclass(frozen=True)
class PretrainedText:
    """A text tokenizer that was trained elsewhere; `content` is that of its file."""

    medium: ClassVar[Medium | None] = TEXT_MEDIUM

    kind: str
    config: PretrainedConfig
    content: bytes
    saved_name: str
    read_file: Callable[[bytes], Codec]

    @cached_property
    def codec(self) -> Codec:
        """The codec that the library makes of the file."""
        return self.read_file(self.content)

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids of SPECIAL_TOKENS: those of the file where it has them, else the next ones behind its ids."""
        ids, following = [], self.codec.num_ids
        names = (self.config.pad, self.config.bos, self.config.eos, *SPECIAL_TOKENS[3:])
        for name, usual in zip(names, SPECIAL_TOKENS, strict=True):
            found = self.codec.special_id(name)
            if found is None and name != usual:
                raise ConfigError(
                    f'text.{usual[1:-1]} = "{name}": no special token of {self.config.file}; leave the key '
                    f"out, and {usual} is added behind its ids"
                )
            ids.append(following if found is None else found)
            following += found is None
        return tuple(ids)

    @property
    def size(self) -> int:
        """Ids of the file and of the special tokens that were added."""
        return max(self.codec.num_ids, *(special + 1 for special in self.special_ids))

    @cached_property
    def golden_ids(self) -> list[int]:
        """Ids that this machine gives to GOLDEN_TEXT."""
        return self.codec.encode(GOLDEN_TEXT)

    @property
    def fingerprint(self) -> str:
        settings = {"kind": self.kind, "special_ids": self.special_ids, "golden": self.golden_ids}
        return fingerprint_of(settings, self.content)

    def read(self, data: str) -> str:
        return read_text(data)

    def encode(self, content: str) -> np.ndarray:
        return np.asarray(self.codec.encode(content), np.int32)

    def decode(self, codes: np.ndarray) -> str:
        return self.codec.decode([int(code) for code in codes if code < self.codec.num_ids])

    def save(self, folder: Path) -> None:
        with atomic_file(folder / self.saved_name) as file:
            file.write(self.content)
        golden = {"text": GOLDEN_TEXT, "ids": self.golden_ids, "library": self.codec.library}
        write_json(folder / GOLDEN, golden)


def pretrained_kind(
    kind: str, names: tuple[str, ...], read_file: Callable[[bytes], Codec], *, needs: str
) -> TokenizerKind:
    """The definition of a kind whose files are called `names`, read by the package `needs`."""

    def open_saved(folder: Path, config: PretrainedConfig) -> PretrainedText:
        content, where = (folder / names[0]).read_bytes(), str(folder / names[0])
        tokenizer = PretrainedText(kind, config, content, names[0], partial(_codec, read_file, needs, where))
        _check_golden(folder / GOLDEN, tokenizer)
        return tokenizer

    def take(_: Iterable[Any], config: PretrainedConfig, seed: int = 0) -> PretrainedText:
        path = find_file(Path(config.file), names)
        read_named = partial(_codec, read_file, needs, f'text.file = "{path}"')
        return PretrainedText(kind, config, path.read_bytes(), names[0], read_named)

    def read(data: Any, config: PretrainedConfig) -> str:
        return read_text(data)

    return TokenizerKind(PretrainedConfig, read=read, fit=take, open=open_saved)


def find_file(path: Path, names: tuple[str, ...]) -> Path:
    """The file of a tokenizer at a path: itself, or one of `names` in a folder. Raises ConfigError."""
    places = [path / name for name in names] if path.is_dir() else [path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise ConfigError(f'text.file = "{path}": there is no file {" or ".join(map(str, places))}')
    return found


def _codec(read_file: Callable[[bytes], Codec], needs: str, where: str, content: bytes) -> Codec:
    """The codec of a file's content. Raises ConfigError, which begins with `where`."""
    try:
        return read_file(content)
    except ImportError:
        raise ConfigError(f'{where}: needs the package {needs}: pip install "motley[tokenizers]"') from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except Exception as error:  # of a library in another language, whose errors have no kind of their own
        raise ConfigError(f"{where}: {needs} cannot read it: {str(error)[:300]}") from None


def _check_golden(path: Path, tokenizer: PretrainedText) -> None:
    """Raise ConfigError unless this machine gives GOLDEN_TEXT the ids that were saved with the tokenizer."""
    saved = read_object(path, {"text": str, "ids": list, "library": str})
    ids = tokenizer.codec.encode(saved["text"])
    if ids != saved["ids"]:
        at = next(
            (i for i, pair in enumerate(zip(ids, saved["ids"], strict=False)) if pair[0] != pair[1]), len(ids)
        )
        raise ConfigError(
            f"{path}: {tokenizer.codec.library} on this machine gives the golden text other ids than "
            f"{saved['library']} gave, from id number {at} on ({json.dumps(ids[at : at + 4])} instead of "
            f"{json.dumps(saved['ids'][at : at + 4])}); install the version that made the data"
        )
