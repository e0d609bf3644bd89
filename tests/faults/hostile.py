"""Raw samples that nobody sends in good faith, and what tokenizing made of the samples beside one."""

import io
import json
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.tokenize.raw import document_sample
from tests.data_pipeline.raw_documents import SUFFIX, document, png, tone, wav

KEY = "hostile"
Sample = dict[str, bytes]


def _picture(content: bytes, suffix: str = "png") -> Sample:
    return {"json": json.dumps({"parts": [{"image": f"0.{suffix}"}]}).encode(), f"0.{suffix}": content}


def _sound(content: bytes) -> Sample:
    return {"json": json.dumps({"parts": [{"speech": "0.wav"}]}).encode(), "0.wav": content}


def _text(content: bytes) -> Sample:
    return {"json": content}


def _rate(hertz: int) -> Sample:
    """A WAV whose header states another rate."""
    content = bytearray(wav(tone(1)))
    content[24:28] = struct.pack("<I", hertz)
    return _sound(bytes(content))


def _image(kind: str, side: int, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, kind, **options)
    return buffer.getvalue()


def _float_wav(value: float) -> bytes:
    from scipy.io import wavfile

    buffer = io.BytesIO()
    wavfile.write(buffer, 16_000, np.full(6400, value, np.float32))
    return buffer.getvalue()


def _broken(content: bytes, rng: Random) -> bytes:
    """Some bytes of it are others, behind its first 8."""
    damaged = bytearray(content)
    for _ in range(rng.randrange(1, 30)):
        damaged[rng.randrange(8, len(damaged))] = rng.randrange(256)
    return bytes(damaged)


SAMPLES: dict[str, Callable[[Random], Sample]] = {
    "no json": lambda rng: {"0.png": png(np.zeros((16, 16, 3), np.uint8))},
    "empty json": lambda rng: _text(b""),
    "json nested 100,000 deep": lambda rng: _text(b"[" * 100_000 + b"]" * 100_000),
    "json with a number of 20,000 digits": lambda rng: _text(
        b'{"parts": [{"text": ' + b"9" * 20_000 + b"}]}"
    ),
    "json in latin-1": lambda rng: _text('{"parts": [{"text": "café"}]}'.encode("latin-1")),
    "a lone surrogate": lambda rng: _text(b'{"parts": [{"text": "a\\ud800b"}]}'),
    "text that is no text": lambda rng: _text(
        rng.choice((b'{"parts": [{"text": 5}]}', b"[1]", b"{}", b"null"))
    ),
    "a part that is not there": lambda rng: _text(b'{"parts": [{"image": "7.png"}]}'),
    "NUL and escapes in text": lambda rng: _text(b'{"parts": [{"text": "\\u0000\\u001b[31m"}]}'),
    "empty png": lambda rng: _picture(b""),
    "cut png": lambda rng: _picture(_image("PNG", 64)[: rng.randrange(9, 80)]),
    "broken png": lambda rng: _picture(_broken(_image("PNG", 64), rng)),
    "png of 9,400 x 9,400": lambda rng: _picture(_image("PNG", 9_400)),
    "png of one pixel": lambda rng: _picture(_image("PNG", 1)),
    "eps": lambda rng: _picture(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "png"
    ),
    "tiff in a png's name": lambda rng: _picture(_image("TIFF", 16)),
    "gif in a png's name": lambda rng: _picture(_image("GIF", 16)),
    "wav of rate 0": lambda rng: _rate(0),
    "wav of rate 1": lambda rng: _rate(1),
    "wav of rate 99,999,999": lambda rng: _rate(99_999_999),
    "empty wav": lambda rng: _sound(b""),
    "cut wav": lambda rng: _sound(wav(tone(1))[: rng.randrange(1, 60)]),
    "broken wav": lambda rng: _sound(_broken(wav(tone(1))[:80], rng)),
    "wav of 1e30": lambda rng: _sound(_float_wav(1e30)),
    "wav of nan": lambda rng: _sound(_float_wav(float("nan"))),
    "random bytes for everything": lambda rng: {"json": rng.randbytes(99), "0.png": rng.randbytes(99)},
    "an escape in its name": lambda rng: _named("hostile\x1b[31mred", rng),
    "a line break in its name": lambda rng: _named("hostile\nmotley: all is well", rng),
    "a path upwards in its name": lambda rng: _named("../../hostile", rng),
}
"""Name of a sample -> its files by extension; with the key "name", that name instead of KEY."""
ENDS_ALL: set[str] = set()
"""Samples that may end tokenizing, with a message that names them."""


def _named(name: str, rng: Random) -> Sample:
    return {"name": name.encode(), "0.png": b"no json beside it"}


def write(path: Path, name: str, rng: Random) -> None:
    """A raw shard with a good document, the sample, and another good document."""
    sample = dict(SAMPLES[name](rng))
    key = sample.pop("name", KEY.encode()).decode()
    good = [(f"good{i}", document_sample(document(i), SUFFIX)) for i in (1, 2)]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for stem, files in (good[0], (key, sample), good[1]):
            for extension, content in files.items():
                info = tarfile.TarInfo(f"{stem}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


def results(root: Path, good: dict[str, Any]) -> dict[str, Any]:
    """As the good results, if the documents beside the sample are there as ever; and what was skipped."""
    manifest = json.loads((root / "tokens" / "manifest.json").read_text())
    own = manifest["shards"][-1]["documents"]
    beside = manifest["shards"][:-1] == good["shards"] and own in (2, 3)
    # A sample that was taken counts as a document; one that was not is in `skipped`.
    whole = beside and own + manifest["num_skipped"] == 3
    listed = {"skipped": manifest["skipped"]}
    return (good if whole else {"shards": manifest["shards"]}) | listed
