"""What tokenizing keeps of the data: figures, and a page of pictures and a sound to judge by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import wavfile

from data_pipeline.files.atomic import atomic_file
from data_pipeline.shards.tar import read_samples
from data_pipeline.tokenize.image import psnr_db
from data_pipeline.tokenize.raw import SampleError, parse_document
from data_pipeline.tokenize.sources import Split
from data_pipeline.tokenize.speech import RATE_HZ
from data_pipeline.tokenize.tokenizer import Tokenizer

PICTURES = "roundtrip.png"
SOUNDS = "roundtrip.wav"
_NUM_PICTURES, _NUM_SOUNDS = 12, 4
_ZOOMED_PX = 128
_MARGIN_PX = 4
_PAUSE_S = 0.4


def show_roundtrip(splits: list[Split], tokenizers: Mapping[str, Tokenizer], out: Path) -> None:
    """Write roundtrip.png (above the original, below decoded) and roundtrip.wav (in turn) where missing."""
    files = {"image": out / PICTURES, "speech": out / SOUNDS}
    missing = {
        name: tokenizers[name] for name, path in files.items() if name in tokenizers and not path.exists()
    }
    if not missing:
        return
    found = _first_contents(splits[0], missing)
    if found.get("image"):
        pairs = [(picture, _again(tokenizers["image"], picture)) for picture in found["image"]]
        with atomic_file(out / PICTURES) as file:
            Image.fromarray(picture_page(pairs)).save(file, "PNG")
    if found.get("speech"):
        pause = np.zeros(int(_PAUSE_S * RATE_HZ), np.float32)
        sounds = [
            s for wave in found["speech"] for s in (wave, pause, _again(tokenizers["speech"], wave), pause)
        ]
        with atomic_file(out / SOUNDS) as file:
            wavfile.write(file, RATE_HZ, np.round(np.concatenate(sounds) * 32767).astype(np.int16))


def _again(tokenizer: Tokenizer, content: Any) -> Any:
    return tokenizer.decode(tokenizer.encode(content))


def _first_contents(split: Split, tokenizers: Mapping[str, Tokenizer]) -> dict[str, list[Any]]:
    wanted = {"image": _NUM_PICTURES, "speech": _NUM_SOUNDS}
    wanted = {kind: count for kind, count in wanted.items() if kind in tokenizers}
    found: dict[str, list[Any]] = {kind: [] for kind in wanted}
    for _, sample in read_samples(split.urls[0]):
        if all(len(found[kind]) >= count for kind, count in wanted.items()):
            break
        try:
            for part in parse_document(sample):
                if part.kind in wanted and len(found[part.kind]) < wanted[part.kind]:
                    content = tokenizers[part.kind].read(part.content)
                    tokenizers[part.kind].encode(content)
                    found[part.kind].append(content)
        except SampleError:
            continue
    return found


def picture_page(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """uint8 [H, W, 3]: the first of each pair above its second, enlarged without smoothing."""
    zoom = max(1, _ZOOMED_PX // pairs[0][0].shape[0])
    columns = [np.concatenate([_framed(picture, zoom) for picture in pair], axis=0) for pair in pairs]
    return np.concatenate(columns, axis=1)


def _framed(picture: np.ndarray, zoom: int) -> np.ndarray:
    enlarged = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return np.pad(enlarged, ((_MARGIN_PX,) * 2, (_MARGIN_PX,) * 2, (0, 0)), constant_values=128)


def summary(name: str, manifest: Mapping[str, Any]) -> str:
    """A few lines on a finished split: documents, tokens by modality, what the tokenizers do."""
    tokens, measured = manifest["tokens"], manifest["measured"]
    total = sum(tokens.values())
    lines = [
        f"{name or 'data'}: {manifest['num_documents']} documents, {manifest['num_skipped']} skipped, "
        f"{total} tokens: "
        + ", ".join(f"{modality} {count} ({count / max(1, total):.0%})" for modality, count in tokens.items())
    ]
    if measured.get("text_tokens"):
        lines.append(f"  text: {measured['text_bytes'] / measured['text_tokens']:.2f} bytes a token")
    if measured.get("decoded_pictures"):
        quality = psnr_db(measured["decoded_squared_error"], measured["decoded_values"])
        share = f"{measured['decoded_pictures']} of {measured['pictures']} pictures"
        lines.append(f"  image: PSNR of decode(encode(x)) {quality:.1f} dB, over {share}")
    if measured.get("speech_s"):
        rate = measured["speech_units"] / measured["speech_s"]
        hours = measured["speech_s"] / 3600
        lines.append(
            f"  speech: {rate:.1f} units a second, {hours:.2f} h in {measured['utterances']} utterances"
        )
    return "\n".join(lines)
