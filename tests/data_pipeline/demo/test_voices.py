import io
import sys
import time
import wave
from random import Random

import numpy as np
import pytest

from data_pipeline.demo.voices import ACCENTS, RATE_HZ, TIMBRES, Speaker, Voice, draw_voice, wav
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.workers import run_tasks

VOICE = Voice("en-us+f2", 180, 50)
VOICES = [accent + timbre for accent in ACCENTS for timbre in TIMBRES]


def speak(seed: int) -> list[bytes]:
    """An utterance of each voice; others, with breath, draw on the time of day."""
    time.sleep(1.1)
    random, speaker = Random(seed), Speaker()
    voices = [Voice(name, random.randint(165, 215), random.randint(30, 70)) for name in VOICES]
    return [speaker.say("a red three and a blue five", voice).tobytes() for voice in voices]


def test_the_same_calls_in_fresh_processes_give_the_same_bytes() -> None:
    with run_tasks(speak, (1, 1), 1, fresh_process_per_task=True) as results:
        first, second = results
    assert first == second
    assert len(set(first)) == len(VOICES), "voices differ"


def test_utterances_last_as_long_as_speech_does_and_have_no_silence_around() -> None:
    speaker = Speaker()
    short, long = (speaker.say(text, VOICE) for text in ("three", "three is to the left of seven"))
    assert 0.15 < len(short) / RATE_HZ < 0.8 < len(long) / RATE_HZ < 2.5
    assert short.dtype == np.int16 and np.abs(long.astype(int)).max() > 5000
    for samples in (short, long):
        loud = np.flatnonzero(np.abs(samples.astype(int)) > 328)
        assert loud[0] < 0.05 * RATE_HZ and len(samples) - loud[-1] < 0.05 * RATE_HZ


def test_rate_and_pitch_are_heard() -> None:
    speaker = Speaker()
    slow, fast = (speaker.say("seven and eight", Voice("en-us", rate, 50)) for rate in (120, 240))
    assert len(slow) > 1.3 * len(fast)


def test_every_voice_that_can_be_drawn_exists() -> None:
    speaker, random = Speaker(), Random(0)
    assert {draw_voice(random).name for _ in range(600)} == set(VOICES)
    assert all(len(speaker.say("two", Voice(name, 180, 50))) > 1000 for name in VOICES)


def test_wav_is_mono_16_bit() -> None:
    samples = np.arange(-500, 500, dtype=np.int16)
    with wave.open(io.BytesIO(wav(samples))) as file:
        assert file.getparams()[:4] == (1, 2, RATE_HZ, 1000)
        assert file.readframes(1000) == samples.tobytes()


def test_without_espeak_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ConfigError, match=r"speech cannot be made: .* espeakng-loader: pip install"):
        Speaker()
