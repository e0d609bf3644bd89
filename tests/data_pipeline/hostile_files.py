"""Hostile and damaged files of every kind that raw data may hold, made from a seed.

Most are one step away from a good file: a field of a header that lies, a cut, flipped bytes.
"""

import gzip
import io
import json
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from random import Random

import numpy as np
from PIL import Image

from tests.data_pipeline.raw_documents import picture, png, tone, wav

ESCAPE = "\x1b[2J\x1b[1;1Hall is well"
NAMES = ("../up", "/etc/down", "a/../../b", f"a{ESCAPE}", "a\nall is well", "a\u202eb", "x" * 300, "a\x9b8mb")
"""Keys that no token shard takes."""


def damaged(good: bytes, random: Random, count: int) -> Iterator[bytes]:
    """Cuts of a good file, and copies of it with a few flipped bytes, half of them in its header."""
    for number in range(count):
        if number % 3 == 0:
            yield good[: random.randrange(len(good))]
            continue
        content = bytearray(good)
        for _ in range(random.randint(1, 4)):
            place = random.randrange(min(64, len(good)) if number % 3 == 1 else len(good))
            content[place] = random.randrange(256)
        yield bytes(content)


def wave_file(
    samples: bytes = bytes(640),
    *,
    tag: int = 1,
    channels: int = 1,
    rate_hz: int = 16_000,
    frame_bytes: int = 2,
    bits: int = 16,
    size: int | None = None,
    before: bytes = b"",
    kind: bytes = b"RIFF",
) -> bytes:
    """A WAV file whose header says what it is told to."""
    bytes_per_s = rate_hz * frame_bytes % (1 << 32)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, tag, channels, rate_hz, bytes_per_s, frame_bytes, bits)
    body = before + form + struct.pack("<4sI", b"data", len(samples) if size is None else size) + samples
    return kind + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def waves(random: Random) -> Iterator[bytes]:
    yield from damaged(wav(tone(1, 0.1)), random, 24)
    yield from (wave_file(rate_hz=rate) for rate in (0, 1, 999, 384_001, 1_000_000_007, 2**32 - 1))
    yield from (wave_file(channels=channels) for channels in (0, 3, 65_535))
    yield from (wave_file(bits=bits) for bits in (0, 1, 7, 12, 33, 65_535))
    yield from (wave_file(frame_bytes=size) for size in (0, 1, 7, 65_535))
    yield from (wave_file(tag=tag) for tag in (0, 0x11, 0x55, 0xFFFE))
    yield from (wave_file(size=size) for size in (0, 1, 641, 2**32 - 1))
    for value in (1e30, np.nan, np.inf, -np.inf, 1e300):
        wide = abs(value) == 1e300
        samples = np.full(2000, value, np.float64 if wide else np.float32).tobytes()
        yield wave_file(samples, tag=3, bits=64 if wide else 32, frame_bytes=8 if wide else 4)
    yield wave_file(before=struct.pack("<4sI", b"junk", 0) * 5000)
    yield wave_file(before=struct.pack("<4sI", b"junk", 2**32 - 1))
    yield from (wave_file(kind=kind) for kind in (b"RIFX", b"RF64"))
    yield wave_file(b"")


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_file(width: int, height: int, *, depth: int = 8, colour: int = 2, extra: bytes = b"") -> bytes:
    """A PNG whose header claims a size, over a few bytes of pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(5000)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + pixels + chunk(b"IEND", b"")


def saved(kind: str, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(3)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def pictures(random: Random) -> Iterator[bytes]:
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        good = saved(kind)
        yield good
        yield from damaged(good, random, 6)
    yield from (saved(kind) for kind in ("EPS", "ICO", "TGA", "PCX", "SGI"))
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(ran) (w) file closefile\nshowpage\n"
    yield from (png_file(*size) for size in ((9400, 9400), (2**31 - 1, 2**31 - 1), (0, 0), (100_000, 1)))
    yield from (png_file(8, 8, depth=depth, colour=colour) for depth, colour in ((16, 3), (7, 2), (1, 6)))
    yield png_file(8, 8, extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 22))))
    yield png_file(8, 8, extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 22))))
    yield b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + saved("GIF")[13:]
    yield b"\xff\xd8\xff\xc0\0\x11\x08\xff\xff\xff\xff\3\1\x11\0\2\x11\0\3\x11\0\xff\xd9"
    canvas = b"VP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2
    yield b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas
    yield b"BM" + struct.pack(
        "<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 1, 1, 0, 0
    )
    yield from (b"P6\n%d %d\n255\nabc" % size for size in ((10**9, 10**9), (0, 5), (10**30, 1)))
    yield from (b"", b"<svg onload='run()'/>", bytes(1000), random.randbytes(1000))


def documents(random: Random) -> Iterator[bytes]:
    """The .json of a sample."""
    yield from damaged(b'{"parts": [{"text": "a red 3"}, {"image": "0.png"}]}', random, 12)
    for depth in (200, 5000, 200_000):
        yield b'{"parts": [{"text": "a"}], "x": ' + b"[" * depth + b"]" * depth + b"}"
        yield b'{"a":' * depth + b"1" + b"}" * depth
    yield b'{"parts": [{"text": "a"}], "x": ' + b"9" * 20_000 + b"}"
    for value in ("NaN", "-Infinity", "1e999999", "[]", "[[]]", "[{}]", "null", '"a"', "[null]", "[3]"):
        yield b'{"parts": %s}' % value.encode()
    for part in ({"text": 3}, {"text": None}, {"text": ["a"]}, {"image": "../../etc/passwd"}, {"image": ""}):
        yield json.dumps({"parts": [part]}).encode()
    yield json.dumps({"parts": [{ESCAPE: "0.png"}]}).encode()
    yield json.dumps({"parts": [{"image": ESCAPE}]}).encode()
    yield json.dumps({"parts": [{"text": "a", "image": "0.png"}]}).encode()
    yield from (b'{"parts": [{"text": "a"}]}\n' * 2, b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"", b"\0", b"[" * 10)
    yield '{"parts": [{"text": "a"}]}'.encode("utf-16")


def texts() -> Iterator[bytes]:
    """Documents of text alone, most of them good."""
    strange = (
        "\0",
        "\u2581\u2581",
        ESCAPE,
        "\u202eabc",
        "\ufffe\uffff",
        "e\u0301" * 500,
        "<bos><eos>",
        " " * 999,
    )
    yield from (
        json.dumps({"parts": [{"text": text}]}).encode() for text in (*strange, "\ud800", "", "a" * 50_000)
    )
    yield from (b'{"parts": [{"text": "%s"}]}' % raw for raw in (b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\t"))


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], layout: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=layout) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def long_name_chain(length: int) -> bytes:
    """A tar that begins with headers of long names, one behind the other."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 5
    return (info.tobuf(tarfile.GNU_FORMAT) + b"name\0".ljust(512, b"\0")) * length + bytes(1024)


def sparse_tar(size: int) -> bytes:
    """A tar with a file of one hole, which is `size` bytes long when it is read."""
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(size)}
    info, content = member("000.json", b"0\n".ljust(512, b"\0"), pax_headers=pax)
    return tar_of([(info, content)])


def tars(random: Random) -> Iterator[bytes]:
    good_json = b'{"parts": [{"text": "a red 3"}]}'
    good = tar_of([member(f"{number:03}.json", good_json) for number in range(3)])
    yield good
    yield from damaged(good, random, 18)
    for name in NAMES:
        yield tar_of([member(f"{name}.json", good_json)])
    yield good.replace(b"000.json", b"\xff\xfe0.jso")
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE, b"Z"):
        yield tar_of([member("000.json", type=kind, linkname="/etc/passwd"), member("001.json", good_json)])
    yield from (sparse_tar(size) for size in (1 << 40, 1 << 62))
    yield from (long_name_chain(length) for length in (3, 3000))
    yield tar_of(
        [member("000.json", good_json), member("000.json", good_json), member("000.png", b"x" * 3000)]
    )
    yield tar_of([member("000.big", bytes(1 << 21)), member("001.json", good_json)])
    yield tar_of([member(".json", good_json), member("a/.json", good_json), member("....json", good_json)])
    yield gzip.compress(good, mtime=0)
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("../000.json"), bytes(1 << 22), zipfile.ZIP_DEFLATED)
    yield from (
        zipped.getvalue(),
        gzip.compress(bytes(1 << 22), mtime=0),
        b"PAR1" + random.randbytes(400) + b"PAR1",
    )
    yield good[:124] + b"\x80" + b"\xff" * 11 + good[136:]


def tables(random: Random) -> Iterator[bytes]:
    """TOML."""
    good = b'seed = 3\n[text]\nvocab_size = 512\n[image]\nfit = "crop"\n'
    yield good
    yield from damaged(good, random, 10)
    yield from (b"x = " + opening * 5000 for opening in (b"[", b"{a="))
    yield b"x = " + b"[" * 5000 + b"]" * 5000
    yield b"x = " + b"[" * 150 + b"]" * 150
    yield from (
        b"seed = " + digits for digits in (b"9" * 20_000, b"0x" + b"f" * 20_000, b"0b" + b"1" * 70, b"1e999")
    )
    yield json.dumps({"x": 1})[1:-1].encode()
    yield from (b'"%s" = 1' % name for name in (rb"\u001b[2J", rb"a\nmotley: all is well", rb"\u202ea", b""))
    yield from (
        b"[text]\n[text]\n",
        b"\xff\xfe",
        b"\0",
        b"[limits]\npicture_mpx = 0",
        b"limits = 3",
        b"text = 3",
    )
    yield b"[limits]\nsample_timeout_s = nan\nwave_s = inf\nwave_min_hz = -1\nsample_mib = '1'\n"
    yield b"[" + b"a." * 3000 + b"a]\n"


KINDS: dict[str, Callable[[Random], Iterator[bytes]]] = {
    "wave": waves,
    "picture": pictures,
    "document": documents,
    "text": lambda _: texts(),
    "tar": tars,
    "table": tables,
}
"""Kind of file -> a function that makes hostile ones."""


def hostile_files(seed: int) -> dict[str, list[bytes]]:
    """Kind -> files."""
    return {kind: list(make(Random(seed))) for kind, make in KINDS.items()}


GOOD_PNG = png(picture(2))
GOOD_WAV = wav(tone(2, 0.1))
