"""Audio files of the formats that only FFmpeg writes."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


def write_coded(
    path: Path, wav: NDArray[np.floating], rate: int, codec: str, **options: str
) -> Path:
    """Write (T,) or (T, C) samples in the container of the suffix of `path`.

    options: of the container, such as `movflags`.
    """
    wav = np.atleast_2d(wav.T)
    layout = {1: "mono", 2: "stereo"}[len(wav)]
    samples = np.ascontiguousarray((32767 * wav).astype(np.int16))
    with av.open(path, "w", options=options) as out:
        stream = out.add_stream(codec, rate=rate)
        stream.layout = layout
        stream.bit_rate = 128_000
        formats = [audio_format.name for audio_format in stream.codec.audio_formats]
        stream.format = next((name for name in formats if name in ("s16", "s16p")), formats[0])
        frame = av.AudioFrame.from_ndarray(samples, format="s16p", layout=layout)
        frame.sample_rate = rate
        frame.pts = 0
        # A codec of fixed frames takes them one by one.
        resampler = av.AudioResampler(stream.format, layout, rate, stream.frame_size or 1152)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(stream.encode(part))
        out.mux(packet for packet in stream.encode(None) if packet.pts is not None)
    return path
