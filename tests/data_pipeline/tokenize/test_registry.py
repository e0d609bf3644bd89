import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.kinds.bpe import BpeConfig, BpeTokenizer
from data_pipeline.tokenize.kinds.log_mel_kmeans import UnitConfig, UnitTokenizer
from data_pipeline.tokenize.kinds.patch_kmeans import PatchConfig, PatchTokenizer
from data_pipeline.tokenize.registry import (
    KINDS,
    SETTINGS,
    default_kind,
    load_kind,
    open_tokenizer,
    save_tokenizer,
    saved_kind,
)
from data_pipeline.tokenize.tokenizer import TokenizerKind
from tests.data_pipeline.video_tokenizer import Video, VideoConfig

VIDEO_KIND = "tests.data_pipeline.video_tokenizer"
VIDEO = Video(VideoConfig(num_codes=2), np.array([100.0], np.float32))


@pytest.mark.parametrize(("modality", "kind"), [(m, kind) for m, kinds in KINDS.items() for kind in kinds])
def test_every_registered_kind_can_be_loaded_without_torch(modality: str, kind: str) -> None:
    assert isinstance(load_kind(modality, kind, "here"), TokenizerKind)
    check = f"import sys, {KINDS[modality][kind]}; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_fingerprints_are_those_of_data_that_was_tokenized_before_kinds_had_names() -> None:
    """Computed by the code of that time; token shards made with it are refused if one changes."""
    numbers = np.arange(160, dtype=np.float32)
    codebook = np.arange(96, dtype=np.uint8).reshape(2, 48)
    sounds, durations = numbers.reshape(2, 2, 40), np.array([1, 2], np.int32)
    assert BpeTokenizer(BpeConfig(), b"model").fingerprint == "380a2f96c906cd19"
    assert PatchTokenizer(PatchConfig(size_px=16), codebook).fingerprint == "638387c299931f57"
    units = UnitTokenizer(UnitConfig(), numbers.reshape(2, 80), numbers[:40], sounds, durations)
    assert units.fingerprint == "fb0b67650cf90cef"


def test_a_default_kind_is_not_written_and_folders_without_a_kind_are_opened_by_it(tmp_path: Path) -> None:
    tokenizer = PatchTokenizer(PatchConfig(size_px=16), np.arange(96, dtype=np.uint8).reshape(2, 48))
    save_tokenizer(tmp_path, "image", "patch_kmeans", tokenizer)
    assert json.loads((tmp_path / SETTINGS).read_text()).keys() == {"fingerprint", "settings"}
    assert saved_kind(tmp_path, "image") == "patch_kmeans"
    assert open_tokenizer(tmp_path, "image").fingerprint == tokenizer.fingerprint


def test_a_modality_without_a_registered_kind_has_no_default() -> None:
    assert default_kind("image") == "patch_kmeans" and default_kind("video") is None


def test_a_saved_tokenizer_is_opened_by_its_kind(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "video", VIDEO_KIND, VIDEO)
    assert saved_kind(tmp_path, "video") == VIDEO_KIND
    assert open_tokenizer(tmp_path, "video").fingerprint == VIDEO.fingerprint
    np.save(tmp_path / "thresholds.npy", np.array([101.0], np.float32))
    with pytest.raises(ConfigError, match="were changed after they were saved"):
        open_tokenizer(tmp_path, "video")


@pytest.mark.parametrize("size", [0, 1, 60, 90])
def test_a_cut_codebook_is_named(tmp_path: Path, size: int) -> None:
    save_tokenizer(tmp_path, "video", VIDEO_KIND, VIDEO)
    content = (tmp_path / "thresholds.npy").read_bytes()
    (tmp_path / "thresholds.npy").write_bytes(content[:size])
    with pytest.raises(ConfigError, match=r"thresholds.npy cannot be read .*; cut or changed"):
        open_tokenizer(tmp_path, "video")


def test_a_saved_tokenizer_of_a_kind_that_is_not_here_is_said(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "video", "my.video", VIDEO)
    with pytest.raises(ConfigError, match=rf'{SETTINGS}: kind = "my.video": my.video cannot be imported'):
        open_tokenizer(tmp_path, "video")


def test_a_kind_that_needs_a_package_which_is_not_installed_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy_kinds").mkdir()
    (tmp_path / "heavy_kinds" / "vqgan.py").write_text("import no_such_codec\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as error:
        load_kind("image", "heavy_kinds.vqgan", "data.toml: image.kind")
    assert str(error.value) == (
        'data.toml: image.kind = "heavy_kinds.vqgan": heavy_kinds.vqgan needs the package no_such_codec, '
        "which is not installed; install it, or choose another kind"
    )


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", json.dumps({"settings": 3, "fingerprint": ""})])
def test_a_folder_that_is_no_saved_tokenizer_is_said(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / SETTINGS).write_text(content)
    with pytest.raises(ConfigError, match="not a saved tokenizer"):
        open_tokenizer(tmp_path, "image")
