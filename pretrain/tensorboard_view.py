"""A run's numbers and pictures for TensorBoard. They are a view of metrics.jsonl, which is the record."""

import io
import os
import socket
import struct
import time
import wave
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from data_pipeline.files.os_errors import naming


class TensorBoardView:
    """A TensorBoard event file. tensorboard's own writer is used because it needs no torch or tensorflow."""

    def __init__(self, folder: Path, *, attempt: int, purge_from_step: int) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        # protobuf creates the classes of these modules at import, where type checkers do not see them.
        self._event_pb2: Any = import_module("tensorboard.compat.proto.event_pb2")
        self._summary_pb2: Any = import_module("tensorboard.compat.proto.summary_pb2")
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names, and a clock may be set back between attempts.
        # "attempt" sorts behind the digits with which names of earlier versions go on.
        name = f"events.out.tfevents.attempt_{attempt:06d}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._file = self._path.open("wb")
        self._writer = RecordWriter(self._file)
        self._put(file_version="brain.Event:2")
        self.purge(purge_from_step)

    def purge(self, step: int) -> None:
        """Make TensorBoard drop all earlier events from `step` on, of this file and of others."""
        start = self._event_pb2.SessionLog(status=self._event_pb2.SessionLog.START)
        self._put(step=step, session_log=start)

    def _put(self, **fields: Any) -> None:
        event = self._event_pb2.Event(wall_time=time.time(), **fields)
        try:
            with naming(self._path):
                self._writer.write(event.SerializeToString())
                self._writer.flush()
        except OSError:
            self._file.raw.close()  # or Python 3.13 tries again at the end, and prints another error
            raise

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the numbers among `values` as scalars."""
        scalars = [
            self._summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, int | float)
        ]
        self._put(step=step, summary=self._summary_pb2.Summary(value=scalars))

    def picture(self, step: int, name: str, pixels: UInt8[np.ndarray, "height width 3"]) -> None:
        """Write an RGB picture."""
        from torch.utils.tensorboard.summary import image

        self._put(step=step, summary=image(name, pixels, dataformats="HWC"))

    def png(self, step: int, name: str, file: bytes) -> None:
        """Write a PNG file as a picture."""
        width, height = struct.unpack(">II", file[16:24])  # of its first chunk, IHDR
        image = self._summary_pb2.Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=file
        )
        self._put_value(step, name, image=image)

    def sound(self, step: int, name: str, file: bytes) -> None:
        """Write a WAV file as sound."""
        with wave.open(io.BytesIO(file)) as read:
            audio = self._summary_pb2.Summary.Audio(
                sample_rate=read.getframerate(),
                num_channels=read.getnchannels(),
                length_frames=read.getnframes(),
                encoded_audio_string=file,
                content_type="audio/wav",
            )
        self._put_value(step, name, audio=audio)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, which TensorBoard shows as Markdown."""
        from torch.utils.tensorboard.summary import text as summary_of

        self._put(step=step, summary=summary_of(name, text))

    def _put_value(self, step: int, name: str, **value: Any) -> None:
        values = [self._summary_pb2.Summary.Value(tag=name, **value)]
        self._put(step=step, summary=self._summary_pb2.Summary(value=values))

    def close(self) -> None:
        with naming(self._path):
            self._writer.close()
