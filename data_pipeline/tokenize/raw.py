"""Raw documents: the form in which a user brings data, and in which the demo corpus is written.

An ordinary WebDataset tar. Each document is a sample: one `KEY.json`, and beside it the files it names.

    000017.json    {"parts": [{"text": "A red 3 left of a blue 5."}, {"image": "0.png"}, {"speech": "0.wav"}]}
    000017.0.png   any picture that Pillow opens (PNG, JPEG, WebP ...)
    000017.0.wav   PCM of any rate, 8 to 32 bits; channels are averaged

`parts` is the document in reading order: text, pictures and utterances interleaved in any number. A part is a
table with one key, its modality; its value is the text itself, or the name of the file after "KEY.".
Other keys beside "parts" are ignored, so shards may carry whatever else their owner needs. Keys hold no
dots (WebDataset ends the key at the first) and are not repeated within a shard.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

JSON = "json"
PART_KINDS = ("text", "image", "speech")


class SampleError(ValueError):
    """One sample that cannot be used; the message says why."""


@dataclass(frozen=True)
class Part:
    """One span of a document. `content` is str for text, else the bytes of the file."""

    kind: str
    content: Any


def parse_document(sample: Mapping[str, bytes]) -> list[Part]:
    """The parts of a sample {extension: content}. Raises SampleError for what the format does not allow."""
    if JSON not in sample:
        raise SampleError(f"no .{JSON} member, only {sorted(sample)}")
    try:
        document = json.loads(sample[JSON])
    except ValueError as error:
        raise SampleError(f".{JSON} is not valid JSON: {error}") from None
    parts = document.get("parts") if isinstance(document, dict) else None
    if not isinstance(parts, list) or not parts:
        raise SampleError(f'.{JSON} needs a list "parts" with at least one part')
    return [_parse_part(part, sample) for part in parts]


def _parse_part(part: object, sample: Mapping[str, bytes]) -> Part:
    if not isinstance(part, dict) or len(part) != 1:
        raise SampleError(f"a part is a table with one key of {', '.join(PART_KINDS)}; got {part!r:.80}")
    ((kind, value),) = part.items()
    if kind not in PART_KINDS or not isinstance(value, str):
        raise SampleError(
            f"a part is {{kind: string}} with a kind of {', '.join(PART_KINDS)}; got {part!r:.80}"
        )
    if kind == "text":
        return Part(kind, value)
    if value not in sample:
        raise SampleError(f'the {kind} part "{value}" is missing; files here: {sorted(sample)}')
    return Part(kind, sample[value])


def document_sample(parts: Sequence[Part], suffix: Mapping[str, str]) -> dict[str, bytes]:
    """The sample of a document: .json and files numbered per suffix; `suffix` is such as {"image": "png"}."""
    files: dict[str, bytes] = {}
    listed: list[dict[str, str]] = []
    counts = dict.fromkeys(suffix.values(), 0)
    for part in parts:
        if part.kind == "text":
            listed.append({"text": part.content})
            continue
        ending = suffix[part.kind]
        name = f"{counts[ending]}.{ending}"
        counts[ending] += 1
        files[name] = part.content
        listed.append({part.kind: name})
    return {JSON: json.dumps({"parts": listed}, ensure_ascii=False).encode(), **files}
