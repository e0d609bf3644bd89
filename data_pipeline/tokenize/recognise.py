"""Which public layout raw samples have, told from the names of their members and the keys of their .json."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from data_pipeline.shards.tar import Sample
from data_pipeline.tokenize.interleaved import INTERLEAVED
from data_pipeline.tokenize.layout import CONVERSATION, SourceSettings, json_values
from data_pipeline.tokenize.raw import JSON, SampleError

_PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tiff", "tif", "image", "images", "img")
_SOUNDS = ("flac", "wav", "mp3", "ogg", "opus", "audio", "speech")
_TEXTS = ("txt", "caption", "text", "cap")
_TEXT_KEYS = (
    "caption",
    "text",
    "content",
    "transcript",
    "transcription",
    "sentence",
    "normalized_text",
    "TEXT",
)
_TURN_KEYS = ("conversations", "messages")
_PICTURE_KEYS = ("image", "images", "image_path", "file_name")
_SOUND_KEYS = ("audio", "audio_filepath", "audio_path", "path")
_LISTS = (("texts", "images"), ("text_list", "image_info"))
_MOST_ENDINGS = 30
"""Samples with more different endings have keys with dots, which were taken for endings."""
_KEPT = 200


@dataclass(frozen=True)
class Shape:
    """A layout is told by the names of a sample's members in small letters and by types in its .json."""

    names: tuple[str, ...]
    values: dict[str, str]


@dataclass(frozen=True)
class Layout:
    """A layout: its name, the source that reads it, and what a person should know."""

    name: str
    source: SourceSettings | None
    """None: it cannot be declared; `note` says what to do."""
    note: str = ""
    modalities: tuple[str, ...] = ("text", "image", "speech")


def shape_of(sample: Sample) -> Shape:
    """The shape of a sample. Raises SampleError for a .json that is no table."""
    read = {name: content for name, content in sample.items() if content is not None}
    try:
        values = json_values(read)
    except SampleError:
        values = {}
    types = {key[:_KEPT]: type(value).__name__ for key, value in list(values.items())[:_KEPT]}
    return Shape(tuple(name.lower()[:_KEPT] for name in list(sample)[:_KEPT]), types)


def recognise(shapes: Sequence[Shape], source: SourceSettings | None = None) -> Layout:
    """The layout of samples that were read as `source` says (None: as WebDataset samples)."""
    dots = source is not None and source.keys_with_dots
    names = Counter(name for shape in shapes for name in shape.names)
    keys = Counter(pair for shape in shapes for pair in shape.values.items())
    if not dots and len(names) > _MOST_ENDINGS and any("_" in name or "-" in name for name in names):
        return Layout("keys with dots", SourceSettings(keys_with_dots=True))
    if keys[("parts", "list")]:
        note = "" if dots else "This is Motley's raw form, which needs no table [source]."
        return Layout("Motley's raw form", SourceSettings(keys_with_dots=dots), note)
    lists = [pair for pair in _LISTS if all(keys[(key, "list")] for key in pair)]
    if lists:
        where = "|".join(f"json:{texts}+{images}" for texts, images in lists)
        return Layout(
            "interleaved documents (OBELICS, MMC4)",
            SourceSettings(parts=({INTERLEAVED: where},), keys_with_dots=dots),
            f'"{where}?" leaves out pictures that are not there.',
            ("text", "image"),
        )
    return _declared(shapes, names, keys, dots)


def _declared(
    shapes: Sequence[Shape], names: Counter[str], keys: Counter[tuple[str, str]], dots: bool
) -> Layout:
    """The layout whose parts are members, files, and values of the .json."""
    parts: list[dict[str, str | bool]] = []
    for modality, endings, file_keys in (
        ("image", _PICTURES, _PICTURE_KEYS),
        ("speech", _SOUNDS, _SOUND_KEYS),
    ):
        found, count = _members(names, endings), 0
        if found:
            where, count = "|".join(found), sum(any(_is(name, found) for name in s.names) for s in shapes)
        elif named := next((key for key in file_keys if keys[key, "str"] or keys[key, "list"]), None):
            where, count = f"file:{named}", keys[named, "str"] + keys[named, "list"]
        else:
            continue
        parts.append({modality: where + "?" * (count < len(shapes))})
    turns = next((key for key in _TURN_KEYS if keys[key, "list"]), None)
    texts = [*_members(names, _TEXTS), *(f"json:{key}" for key in _TEXT_KEYS if keys[key, "str"])][:1]
    if turns is not None:
        parts.append({CONVERSATION: f"json:{turns}"})
    for where in texts if turns is None else []:
        parts.append({"text": where})
    if not parts:
        return Layout(
            "not known",
            None,
            "Declare where its parts are: a table [source] as docs/data.md says, or the raw form.",
        )
    modalities = ("text", *(name for part in parts for name in part if name not in (CONVERSATION, "text")))
    return Layout(
        _name(parts, names),
        SourceSettings(parts=tuple(parts), keys_with_dots=dots),
        _note(parts, names),
        modalities,
    )


def _is(name: str, endings: Sequence[str]) -> bool:
    return name in endings or name.partition(".")[0] in endings


def _members(names: Counter[str], endings: Sequence[str]) -> list[str]:
    """The endings that members have, the commonest first; "images.0" counts as "images"."""
    found = Counter(
        {ending: sum(n for name, n in names.items() if _is(name, [ending])) for ending in endings}
    )
    return [ending for ending, count in found.most_common() if count]


def _name(parts: list[dict[str, str | bool]], names: Counter[str]) -> str:
    kinds = {kind for part in parts for kind in part}
    if CONVERSATION in kinds:
        return "conversations" + (" with pictures (LLaVA)" if "image" in kinds else " (ShareGPT)")
    if "image" in kinds:
        return "pictures with captions (img2dataset, LAION, CC12M, DataComp)"
    if "speech" in kinds:
        return "speech with transcripts (LibriSpeech, GigaSpeech, Common Voice)"
    return "plain text" if names["txt"] else "rows of text"


def _note(parts: list[dict[str, str | bool]], names: Counter[str]) -> str:
    """Return what of the samples is not read, and what else may be declared."""
    used = "|".join(where for part in parts for where in part.values() if isinstance(where, str))
    unused = [name for name in names if name != JSON and not _is(name, used.replace("?", "").split("|"))]
    kinds = {kind for part in parts for kind in part}
    notes = [f"Not read: members {', '.join(sorted(unused)[:8])}."] if unused else []
    if CONVERSATION not in kinds and len(kinds) > 1:
        notes.append('order = "shuffled" trains both directions: a hash of the key orders the parts.')
    return " ".join(notes)
