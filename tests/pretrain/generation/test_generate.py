"""`motley generate` on an untrained model, whose samples are noise of the right form."""

import errno
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import wavfile

from data_pipeline.tokenize.media.pictures import png
from data_pipeline.tokenize.media.waves import wav
from tests.pretrain.tiny_tokenizers import PICTURE_PX, SECOND, tone
from tools.cli import main


@pytest.fixture
def prompt_files(tmp_path: Path) -> dict[str, Path]:
    """A picture of another size than the tokenizer's, and a tone."""
    files = {"image": tmp_path / "in.png", "speech": tmp_path / "in.wav", "broken": tmp_path / "broken.png"}
    files["image"].write_bytes(png(np.full((20, 12, 3), 90, np.uint8)))
    files["speech"].write_bytes(wav(tone(440)))
    files["broken"].write_bytes(b"\x89PNG and no more")
    return files


def generate(speaker: Path, out: Path, *options: Any) -> int:
    words = ["generate", speaker / "weights", "--tokenizers", speaker / "tokenizers", "--out", out, *options]
    return main([str(word) for word in words])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_prompt_of_all_modalities_becomes_pictures_and_a_page(
    speaker: Path, tmp_path: Path, prompt_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = (
        "--prompt", "A <b>red</b> 3", "--image", prompt_files["image"], "--speech", prompt_files["speech"],
        "--to", "image", "--samples", 2,
    )  # fmt: skip
    assert generate(speaker, tmp_path / "out", *options) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'index.html'}: 2 samples of each of 1 prompts, 12 tokens" in told
    found = contents(tmp_path / "out")
    assert list(found) == ["000_00.txt", "000_00_0.png", "000_01.txt", "000_01_0.png", "index.html"]
    assert found["000_00.txt"] == b"[000_00_0.png]\n"
    assert Image.open(io.BytesIO(found["000_00_0.png"])).size == (PICTURE_PX, PICTURE_PX)
    page = found["index.html"].decode()
    # The prompt's picture and sound, and two samples, all inside of the page; text is escaped.
    assert page.count('src="data:image/png;base64,') == 3 and page.count('src="data:audio/wav;base64,') == 1
    assert "A &lt;b&gt;red&lt;/b&gt; 3" in page and "speaker, step 7" in page
    assert re.findall(r'(?:src|href)="(.{5})', page) == ["data:"] * 4 and "url(" not in page

    assert generate(speaker, tmp_path / "again", *options) == 0
    assert contents(tmp_path / "again") == found
    assert generate(speaker, tmp_path / "other", *options, "--seed", 2) == 0
    assert contents(tmp_path / "other").keys() == found.keys() and contents(tmp_path / "other") != found


def test_images_as_vectors_become_pictures_behind_prompts_that_hold_some(
    speaker: Path, tmp_path: Path, prompt_files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same seed writes the same bytes; steps, sampler and the picture of the prompt change them."""
    options = ("--prompt", "A red 3", "--image", prompt_files["image"], "--to", "image", "--samples", 2)
    found: dict[str, dict[str, bytes]] = {}
    for name, more in {
        "out": ("--image-steps", 4), "again": ("--image-steps", 4), "steps": ("--image-steps", 5),
        "sampler": ("--image-steps", 4, "--sampler", "ddim"),
        "prompt": ("--image-steps", 4, "--image", prompt_files["image"]),
    }.items():  # fmt: skip
        assert generate(speaker / "pixels", tmp_path / name, *options, *more) == 0, capsys.readouterr().err
        found[name] = contents(tmp_path / name)
    assert list(found["out"]) == ["000_00.txt", "000_00_0.png", "000_01.txt", "000_01_0.png", "index.html"]
    pixels = np.asarray(Image.open(io.BytesIO(found["out"]["000_00_0.png"])))
    assert pixels.shape == (PICTURE_PX, PICTURE_PX, 3) and len(np.unique(pixels)) > 20
    page = found["out"]["index.html"].decode()
    assert page.count('src="data:image/png;base64,') == 3 and "images in 4 steps of ddpm" in page
    assert found["again"] == found["out"]
    pictures = {name: found[name]["000_00_0.png"] for name in ("out", "steps", "sampler", "prompt")}
    assert len(set(pictures.values())) == 4
    flags = ("--prompt", "A", "--sampler", "euler")
    assert generate(speaker / "pixels", tmp_path / "none", *flags) == 2
    assert "--sampler euler: the model learned image by diffusion" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_speech_and_text_become_files(speaker: Path, tmp_path: Path) -> None:
    assert generate(speaker, tmp_path / "sound", "--prompt", "", "--to", "speech", "--max-tokens", 9) == 0
    rate, samples = wavfile.read(tmp_path / "sound" / "000_00_0.wav")
    assert rate == SECOND and samples.dtype == np.int16 and len(samples) > 0
    assert generate(speaker, tmp_path / "text", "--prompt", "A ", "--to", "text", "--max-tokens", 9) == 0
    assert list(contents(tmp_path / "text")) == ["000_00.txt", "index.html"]
    assert (tmp_path / "text" / "000_00.txt").read_text().strip()


def test_a_prompt_may_be_read_under_top_k(
    speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page and the output say so; weights without a run hold the thresholds that it takes."""
    told = {}
    for name, rules in (
        ("plain", ()),
        ("top_k", ("--prefill-rule", "top_k")),
        ("all", ("--prefill-rule", "top_k", "--decode-rule", "all")),
    ):
        words = ["generate", speaker / "routed", "--tokenizers", speaker / "tokenizers"]
        words += ["--out", tmp_path / name, "--prompt", "A red green blue 3", "--max-tokens", 9, *rules]
        assert main([str(word) for word in words]) == 0
        told[name] = capsys.readouterr().out, (tmp_path / name / "index.html").read_text()
    assert not any("top_k" in text for text in told["plain"])
    for name, written in (("top_k", "run by thresholds"), ("all", "run in all layers")):
        assert all(
            f"own rule, top_k; tokens that are written {written}" in text.replace("&#39;", "'")
            for text in told[name]
        )


MISTAKES = {
    "no prompt": ((), "give a prompt"),
    "prompt and held-out": (("--prompt", "a", "--heldout", "1"), "one of both"),
    "held-out of weights": (("--heldout", "1"), "belong to no run"),
    "unknown goal": (("--prompt", "a", "--to", "imagge"), 'text, image, speech, free; did you mean "image"?'),
    "too long": (("--prompt", "red blue green " * 30), "shorten it"),
    "no room": (("--prompt", "a", "--to", "image", "--max-tokens", "5"), "--to image takes at least 6"),
    "top-p": (("--prompt", "a", "--top-p", "1.5"), "--top-p 1.5: more than 0, at most 1"),
    "top-k": (("--prompt", "a", "--top-k", "0"), "--top-k 0: a whole number, 1 or more"),
    "temperature": (("--prompt", "a", "--temperature", "nan"), "--temperature nan: 0 (greedy) to 1000"),
    "seed": (("--prompt", "a", "--seed", "-1"), "--seed -1"),
    "samples": (("--prompt", "a", "--samples", "0"), "--samples 0"),
    "image steps": (("--prompt", "a", "--image-steps", "0"), "--image-steps 0: a whole number, 1 or more"),
    "steps of ids": (("--prompt", "a", "--image-steps", "9"), "this model learned none; leave it out"),
    "guidance": (("--prompt", "a", "--guidance", "3"), "trained with dropped conditions"),
    "prefill rule": (("--prompt", "a", "--prefill-rule", "top_k"), "--prefill-rule top_k: no model.depth"),
    "decode rule": (("--prompt", "a", "--decode-rule", "all"), "goes with --prefill-rule top_k alone"),
    "no such file": (("--image", "nowhere.png"), "--image nowhere.png: cannot be read: No such file"),
    "broken picture": (("--image", "BROKEN"), "the picture cannot be decoded"),
    "a tone as a picture": (("--image", "SPEECH"), "the picture cannot be decoded"),
    "surrogate": (("--prompt", "\ud800"), "text is not valid Unicode"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(
    name: str,
    speaker: Path,
    tmp_path: Path,
    prompt_files: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options, message = MISTAKES[name]
    given = {"BROKEN": prompt_files["broken"], "SPEECH": prompt_files["speech"]}
    assert generate(speaker, tmp_path / "out", *(given.get(word, word) for word in options)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1, error
    assert not list(tmp_path.glob("*out*"))


def test_an_existing_folder_and_a_full_disk_are_told(
    speaker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    assert generate(speaker, tmp_path / "there", "--prompt", "a") == 2
    assert "exists; choose another folder, or remove it" in capsys.readouterr().err

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("data_pipeline.files.atomic.os.fsync", full)
    assert generate(speaker, tmp_path / "out", "--prompt", "a", "--max-tokens", "3") == 2
    assert f"--out {tmp_path / 'out'}: cannot be written: No space left" in capsys.readouterr().err
    assert not list(tmp_path.glob("*out*"))
