"""Layouts by declaration: the table [source] of a data.toml says where the parts of a document are.

    [source]
    parts = [{image = "jpg|png"}, {text = "json:caption|txt"}]

A part is {modality = where}. Where it is:

    jpg              the member KEY.jpg of a tar, in small or capital letters; a column of Parquet
    json:caption     the value of a key of the sample's .json, or of a row of JSON lines or Parquet
    file:image       the file, below `folder`, that a key of the .json names; a list names several
    a|b              the first of these that the sample has
    a?               nothing, where the sample has none

`loss = false` beside it, as in {text = "json:prompt", loss = false}, makes a part context: the model is not
trained to write it.

`{conversation = "json:conversations"}` stands for turns of {from, value} or {role, content}. They become
lines `ROLE: text`, and each `<image>` or `<speech>` in the text takes the next part of that modality that is
listed before the conversation. With `loss = "answers"`, what ASSISTANT says is trained on and all other text
is context. `{interleaved = "json:texts+images"}` stands for two lists (interleaved.py). Without [source],
documents have the form of raw.py.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from data_pipeline.files.printable import hidden_characters
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.interleaved import INTERLEAVED, interleaved_parts, keys_of
from data_pipeline.tokenize.raw import JSON, LOSS, Part, SampleError, json_content, member, parse_document

FILE_PREFIX = "file:"
_JSON_PREFIX = "json:"
CONVERSATION, ANSWERS = "conversation", "answers"
_PLACEHOLDER = re.compile(r"<(image|speech|audio)>")
_MODALITY_OF = {"audio": "speech"}
_ROLES = {"human": "USER", "user": "USER", "gpt": "ASSISTANT", "assistant": "ASSISTANT", "system": "SYSTEM"}


class SourceSettings(BaseModel):
    """The table [source] of a data.toml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: tuple[dict[str, str | bool], ...] = ()
    """Parts of a document in reading order; none: the .json of a sample lists them, as raw.py says."""
    order: Literal["listed", "shuffled"] = "listed"
    """shuffled: a hash of the sample's key decides the order of its parts."""
    keys_with_dots: bool = False
    """A member's ending is what `parts` names, else what follows its last dot; False: its first dot."""
    files: str = ""
    """Pattern of the names of files that are read, such as "*.jsonl"; empty: the first kind that is there, of
    tars, Parquet, JSON lines, JSON and text."""
    folder: str = "."
    """Where files that a .json names are: a folder relative to the file that names them."""
    documents: Literal["file", "line"] = "file"
    """What is a document of a .txt file."""

    @model_validator(mode="after")
    def _check(self) -> "SourceSettings":
        for part in self.parts:
            named = [name for name in part if name != LOSS]
            if len(named) != 1 or not isinstance(where := part[named[0]], str) or not wheres(where):
                raise ValueError(
                    f'parts: {part} is no part; a part is {{modality = "where"}}, such as '
                    '{image = "jpg"} or {text = "json:caption"}'
                )
            if named[0] == INTERLEAVED and not all(keys_of(one) for one in wheres(where)):
                raise ValueError(
                    f'parts: {part} names no two lists; it is such as {{{INTERLEAVED} = "json:texts+images"}}'
                )
            legal = (True, False, ANSWERS) if named[0] == CONVERSATION else (True, False)
            if part.get(LOSS, True) not in legal:
                raise ValueError(f"parts: {part}: loss is one of {', '.join(map(json.dumps, legal))}")
        if (folder := PurePosixPath(self.folder)).is_absolute() or ".." in folder.parts:
            raise ValueError(f'folder = "{self.folder}": a folder below that of the shards')
        return self

    def __hash__(self) -> int:  # `parts` holds dicts, which have none.
        return hash(self.model_dump_json())

    @property
    def listed(self) -> list[tuple[str, str, bool | str]]:
        """(modality, where, loss) of each part."""
        found = []
        for part in self.parts:
            ((modality, where),) = ((name, value) for name, value in part.items() if name != LOSS)
            found.append((modality, str(where), part.get(LOSS, True)))
        return found

    @property
    def endings(self) -> tuple[str, ...]:
        """Endings of members that `parts` names, the longest first, in small letters."""
        found = {where.lower() for _, value, _ in self.listed for where in wheres(value)}
        named = {where for where in found if not where.startswith((_JSON_PREFIX, FILE_PREFIX))}
        return tuple(sorted({*named, JSON}, key=lambda ending: (-len(ending), ending)))

    @property
    def file_keys(self) -> tuple[str, ...]:
        """Keys of the .json that name files."""
        found = [where for _, value, _ in self.listed for where in wheres(value)]
        return tuple(where.removeprefix(FILE_PREFIX) for where in found if where.startswith(FILE_PREFIX))

    def as_toml(self) -> str:
        """The table [source] as a data.toml holds it; "" where all values are defaults."""
        lines = []
        for name, value in self.model_dump(exclude_defaults=True).items():
            if name == "parts":
                pairs = [[f"{key} = {json.dumps(where)}" for key, where in part.items()] for part in value]
                tables = [f"{{{', '.join(own)}}}" for own in pairs]
                lines.append(f"parts = [{', '.join(tables)}]")
            else:
                lines.append(f"{name} = {json.dumps(value)}")
        return "\n".join(["[source]", *lines]) if lines else ""


RAW = SourceSettings()
"""The form of raw.py."""


def wheres(value: str) -> list[str]:
    """The alternatives of "a|b?"; [] where one of them is empty."""
    found = value.removesuffix("?").split("|")
    return found if all(where.removeprefix(_JSON_PREFIX).removeprefix(FILE_PREFIX) for where in found) else []


def parts_of(key: str, sample: Mapping[str, bytes], source: SourceSettings) -> list[Part]:
    """The parts of a sample {ending: bytes}. Raises SampleError for what the layout does not allow."""
    if not source.parts:
        return parse_document(sample)
    values = json_values(sample)
    parts: list[Part] = []
    for modality, where, loss in source.listed:
        optional = where.endswith("?")
        if modality == INTERLEAVED:
            found = _interleaved(where, key, sample, values)
        else:
            found = _found(where, sample, values)
        if not found and not (optional and modality != INTERLEAVED):
            raise SampleError(_missing(modality, where, sample, values))
        if modality == CONVERSATION:
            parts = _conversation(parts, found, loss)
        elif modality == INTERLEAVED:
            parts += [replace(part, loss=bool(loss)) for part in found]
        else:
            contents = [_text(value, where) if modality == TEXT else value for value in found]
            parts += [Part(modality, content, bool(loss)) for content in contents]
            _check_content(parts, modality, where)
    if not parts:
        raise SampleError("none of its parts is there")
    if source.order == "shuffled":
        parts = [parts[i] for i in sorted(range(len(parts)), key=lambda i: _rank(key, i))]
    return parts


def json_values(sample: Mapping[str, bytes]) -> Mapping[str, Any]:
    """The table of a sample's .json; {} without one. Raises SampleError for what is no table."""
    content = member(sample, JSON)
    if content is None:
        return {}
    values = json_content(content)
    if not isinstance(values, dict):
        raise SampleError(f".{JSON} holds no table")
    return values


def value_at(values: Mapping[str, Any], path: str) -> Any:
    """The value of a key, or of a key in a table in it: "a.b"; None where there is none."""
    if path in values or "." not in path:
        return values.get(path)
    first, _, rest = path.partition(".")
    inner = values.get(first)
    return value_at(inner, rest) if isinstance(inner, dict) else None


def file_names(values: Mapping[str, Any], key: str) -> list[str]:
    """Names of files that a key of a .json holds: one, or a list."""
    value = value_at(values, key)
    return [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]


def is_inside(name: str) -> bool:
    """Whether a name from data is that of a file below a folder."""
    path = PurePosixPath(name)
    return bool(name) and not (path.is_absolute() or ".." in path.parts or hidden_characters(name))


def _found(where: str, sample: Mapping[str, bytes], values: Mapping[str, Any]) -> list[Any]:
    """Return what the first alternative of `where` that the sample has gives; [] where it has none."""
    for option in wheres(where):
        if option.startswith(_JSON_PREFIX):
            value = value_at(values, option.removeprefix(_JSON_PREFIX))
            found = [] if value is None else [value]
        elif option.startswith(FILE_PREFIX):
            found = [_file(name, sample) for name in file_names(values, option.removeprefix(FILE_PREFIX))]
        elif (content := member(sample, option)) is not None:
            found = [content]
        else:
            numbered = (f"{option}.{number}" for number in range(len(sample)))
            found = [sample[name] for name in numbered if name in sample]
        if found:
            return found
    return []


def _interleaved(where: str, key: str, sample: Mapping[str, bytes], values: Mapping[str, Any]) -> list[Part]:
    """Return the parts that the first alternative of `where` whose lists the sample has gives."""
    optional = where.endswith("?")
    options = (interleaved_parts(one, key, sample, values, optional=optional) for one in wheres(where))
    return next((parts for parts in options if parts), [])


def _file(name: str, sample: Mapping[str, bytes]) -> bytes:
    content = sample.get(FILE_PREFIX + name)
    if content is None:
        raise SampleError(
            f'names the file "{name}", which is not a regular file below [source] folder; legal: a name '
            "relative to it, without .."
        )
    return content


def _missing(modality: str, where: str, sample: Mapping[str, bytes], values: Mapping[str, Any]) -> str:
    there = sorted(name for name in sample if not name.startswith(FILE_PREFIX))
    keys = f", keys of its .{JSON}: {sorted(values)}" if values else ""
    return (
        f'has no {modality} at "{where}"; members here: {there}{keys}. The members of a sample must follow '
        "each other in the tar and share the name up to the first dot (else: keys_with_dots = true)"
    )


def _text(value: Any, where: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise SampleError(f'the text at "{where}" is not UTF-8: {error}') from None
    if not isinstance(value, str):
        raise SampleError(f'the text at "{where}" is {type(value).__name__}, {value!r:.60}, and no text')
    return value


def _check_content(parts: list[Part], modality: str, where: str) -> None:
    if modality != TEXT and any(
        not isinstance(part.data, bytes) for part in parts if part.modality == modality
    ):
        raise SampleError(
            f'the {modality} at "{where}" is a value of the .json and no file; use file: or an ending'
        )


def _conversation(media: list[Part], found: list[Any], loss: bool | str) -> list[Part]:
    """The parts of a conversation: its text, with `media` at their placeholders; others come first."""
    turns = found[0] if found else []
    turns = json.loads(turns) if isinstance(turns, str) else turns
    if not isinstance(turns, list):
        raise SampleError(f"a conversation is a list of turns; got {turns!r:.60}")
    said = [_turn(turn) for turn in turns]
    left, parts = list(media), list[Part]()
    for text, counts in _segments(said, loss):
        position = 0
        for match in _PLACEHOLDER.finditer(text):
            modality = _MODALITY_OF.get(match[1], match[1])
            number = next((i for i, part in enumerate(left) if part.modality == modality), None)
            if number is None:
                raise SampleError(
                    f"its conversation has more {match[0]} than the sample has parts of {modality}"
                )
            parts += [Part(TEXT, text[position : match.start()], counts), left.pop(number)]
            position = match.end()
        parts.append(Part(TEXT, text[position:], counts))
    return [*left, *(part for part in parts if part.modality != TEXT or part.data)]


def _segments(said: list[tuple[str, str]], loss: bool | str) -> list[tuple[str, bool]]:
    """(text, whether it is trained on) in order, of turns (role, text): one text, or one for each change."""
    if loss != ANSWERS:
        return [("".join(f"{role}: {text}\n" for role, text in said), bool(loss))]
    found: list[tuple[str, bool]] = []
    for role, text in said:
        answers = role == _ROLES["assistant"]
        found += [(f"{role}: ", False), (f"{text}\n", answers)]
    return found


def _turn(turn: Any) -> tuple[str, str]:
    """(role, text) of a turn."""
    role, value = ("from", "value") if isinstance(turn, dict) and "from" in turn else ("role", "content")
    if (
        not isinstance(turn, dict)
        or not isinstance(turn.get(role), str)
        or not isinstance(turn.get(value), str)
    ):
        raise SampleError(f"a turn is {{from, value}} or {{role, content}}, both text; got {turn!r:.80}")
    said_by = str(turn[role])
    return _ROLES.get(said_by.lower(), said_by), turn[value]


def _rank(key: str, part: int) -> bytes:
    return hashlib.sha256(f"{key}\0{part}".encode(errors="surrogatepass")).digest()
