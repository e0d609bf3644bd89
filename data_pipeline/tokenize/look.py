"""`motley look`: the layout of raw data, told from its first samples, and what would become of them."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_pipeline.files.printable import printable
from data_pipeline.shards.tar import Location, Sample
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.isolated import Refused, use_samples
from data_pipeline.tokenize.layout import RAW, SourceSettings
from data_pipeline.tokenize.limits import Limits, parts_within
from data_pipeline.tokenize.raw import JSON, SampleError
from data_pipeline.tokenize.recognise import Layout, Shape, recognise, shape_of
from data_pipeline.tokenize.registry import default_kind, load_kind
from data_pipeline.tokenize.sources import Split, commands_of, find_splits

SAMPLES = 100
"""So many samples are read."""
_BYTES_A_TOKEN = 4
"""Of text; byte pairs of English make 3.5 to 4.5."""
_SHOWN = 8
_LIMITS = Limits.model_validate({})


@dataclass(frozen=True)
class Expected:
    """A sample becomes so many tokens by modality, at the defaults of its tokenizers."""

    tokens: dict[str, int]
    masked: int
    """Tokens of parts that are context, with loss = false."""


def look(src: str) -> str:
    """Return a page about the raw data of SRC. Raises ConfigError where there is none, or a damaged shard."""
    splits = find_splits(src)
    shards = _spread(splits[0].shards)
    seen = [made for _, _, made in _first_samples(shards, _shape, RAW)]
    layout = recognise([shape for shape in seen if isinstance(shape, Shape)])
    if layout.source is not None and layout.source.keys_with_dots:
        seen = [made for _, _, made in _first_samples(shards, _shape, layout.source)]
        layout = recognise([shape for shape in seen if isinstance(shape, Shape)], layout.source)
    lines = [_found(src, splits, len(seen)), f"layout: {layout.name}", *_members(seen)]
    lines += [f"runs a command for a shard: {command}" for command in commands_of(splits)[:1]]
    if layout.source is None:
        return "\n".join(printable(line) for line in [*lines, layout.note])
    lines += _to_paste(layout)
    page = "\n".join(line if line.startswith("\n") else printable(line) for line in lines)
    return f"{page}\n{_outcome(shards, layout.source)}"


def _spread(shards: Sequence[Location]) -> list[Location]:
    """At most SAMPLES shards, spread over all."""
    return list(shards[:: max(1, len(shards) // SAMPLES)])[:SAMPLES]


def _first_samples(
    shards: list[Location], use: Any, source: SourceSettings
) -> list[tuple[Location, str, Any]]:
    per_shard = -(-SAMPLES // len(shards))
    return list(use_samples(shards, use, _LIMITS, per_shard=per_shard, source=source))


def _shape(_: str, sample: Sample) -> Shape:
    return shape_of(sample)


def _expected(source: SourceSettings) -> Any:
    """The function that says what a sample becomes, with every part decoded as tokenizing would."""

    def use(key: str, sample: Sample) -> Expected:
        tokens: Counter[str] = Counter()
        masked = 0
        for part in parts_within(sample, _LIMITS, key=key, source=source):
            count = _tokens_of(part.modality, part.data)
            tokens[part.modality] += count
            masked += 0 if part.loss else count
        return Expected(dict(tokens), masked)

    return use


def _tokens_of(modality: str, data: Any) -> int:
    kind = default_kind(modality)
    if kind is None:
        raise SampleError(f"has a part of {modality}, for which Motley brings no tokenizer")
    definition = load_kind(modality, kind, modality)
    config: Any = definition.config()
    content = definition.read(data, config)
    if modality == TEXT:
        return -(-len(content.encode()) // _BYTES_A_TOKEN)
    if modality == "image":
        return (config.size_px // config.patch_px) ** 2 + 2
    from data_pipeline.tokenize.media.waves import RATE_HZ

    return int(len(content) / RATE_HZ * config.units_per_s) + 2


def _found(src: str, splits: list[Split], num_samples: int) -> str:
    counts = ", ".join(f"{len(split.listing)} in {split.name or 'the folder itself'}" for split in splits)
    return f"{src}: raw shards: {counts}; {num_samples} samples read"


def _members(seen: Sequence[Shape | Refused]) -> list[str]:
    shapes = [shape for shape in seen if isinstance(shape, Shape)]
    members = Counter(name for shape in shapes for name in shape.names)
    keys = Counter(key for shape in shapes for key in shape.values)
    lines = [f"members: {_listed(members)}"]
    return [*lines, f"keys of the .{JSON}: {_listed(keys)}"] if keys else lines


def _listed(counts: Counter[str]) -> str:
    shown = ", ".join(f"{name} {count}" for name, count in counts.most_common(_SHOWN))
    return f"{shown}, and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else shown or "none"


def _to_paste(layout: Layout) -> list[str]:
    assert layout.source is not None, "a layout that can be read has a source"
    table = layout.source.as_toml()
    modalities = layout.modalities
    tables = "\n".join(f"[{modality}]" for modality in modalities)
    head = f"\ndata.toml for it:\n\n{tables}\n{table}"
    return [head, *([f"# {layout.note}"] if layout.note else [])]


def _outcome(shards: list[Location], source: SourceSettings) -> str:
    """Return lines that say how many samples become documents, why others do not, and how long they are."""
    results = _first_samples(shards, _expected(source), source)
    expected = [made for _, _, made in results if isinstance(made, Expected)]
    good = [made.tokens for made in expected]
    lines = [f"documents: {len(good)} of {len(results)} samples can be used"]
    lost: dict[str, list[tuple[str, str]]] = {}
    for _, key, made in results:
        if isinstance(made, Refused):
            lost.setdefault(re.sub(r"\d+", "#", made.reason), []).append((key, made.reason))
    for cases in sorted(lost.values(), key=len, reverse=True)[:_SHOWN]:
        lines.append(f"  lost {len(cases)}, such as {printable(cases[0][0])}: {cases[0][1]}")
    if good:
        modalities = sorted({name for tokens in good for name in tokens})
        means = ", ".join(
            f"{name} {sum(tokens.get(name, 0) for tokens in good) / len(good):.0f}" for name in modalities
        )
        longest = max(sum(tokens.values()) for tokens in good) + 2
        lines.append(
            f"tokens a document, by default tokenizers and {_BYTES_A_TOKEN} bytes of text a token: "
            f"{means}; the longest document {longest}"
        )
        if masked := sum(made.masked for made in expected):
            total = sum(sum(tokens.values()) for tokens in good)
            lines.append(f"context without loss (loss = false): {masked / total:.0%} of the tokens")
    return "\n".join(lines)
