"""Recordings to log-mel frames: 16 kHz, windows of 25 ms every 10 ms, 80 mel bins.

The scale is HTK's (mel = 2595 log10(1 + f / 700)), triangles of unit peak between 20 Hz and
8 kHz, as in the filterbanks of Kaldi-style recognisers.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.transforms import containers

RATE = 16_000
WINDOW = 400
HOP = 160
FFT = 512
MELS = 80
LOW, HIGH = 20.0, 8_000.0
#: Each sample less this share of the one before: no direct current, less hum, and consonants
#: that are not drowned by vowels. Without it an offset of the recorder hides where speech ends.
EMPHASIS = 0.97
#: Speech is what lies within this many decibels of the loudest frame.
TRIM_DB = 25.0
#: Root mean square that speech is scaled to.
LEVEL = 0.1
#: Added to the power before the logarithm.
FLOOR = 1e-4
#: Of log-mel values of the training recordings of ``syllables``; one pair for all bins, the
#: same for every corpus, so that one stem can read them all.
MEAN, DEVIATION = -2.8, 3.2
MAX_FRAMES = 192
MAX_SECONDS = 600
TOO_LONG = f"longer than {MAX_SECONDS} seconds"
CUT_SHORT = "cut short: the file ends before its recording does"
NON_FINITE_SAMPLES = "samples that are no numbers (NaN or infinite)"
#: Who writes to a pipe cannot know the length, and writes the most: ``ffmpeg`` all ones, ``sox``
#: whole frames of a little less than this half.
_UNKNOWN = 0x7FFF0000
#: Bytes: some writers take the head for part of the samples.
_HEAD = 64
#: Of a WAV file before its samples, that are looked through.
_MOST_CHUNKS = 1_000
#: Of a WAV, whose head says all: else FFmpeg looks through half a megabyte for other sound in
#: disguise, which takes longer than all that follows.
_PROBED = 8_192


def decode_audio(data: bytes, rate: int = RATE) -> NDArray[np.float32]:
    """Read an MP3, WAV (or what else ``containers.FORMATS`` names) file.

    Returns:
        float32 samples, mono, at ``rate`` Hz.

    Raises:
        ValueError: the bytes are no recording, it is empty, cut short, longer than ten minutes,
            or holds values that are no numbers.
    """
    import av

    if data[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError("a web page, not a recording")
    if _wav_is_cut(data) or _ogg_is_cut(data):
        raise ValueError(CUT_SHORT)
    options = {"probesize": str(_PROBED)} if _is_wav(data) else {}
    try:
        with containers.open_container(data, **options) as container:
            stream = containers.first_stream(container.streams.audio, "no sound in the file")
            said = _seconds_said(container, stream, data)
            if said > MAX_SECONDS:
                raise ValueError(TOO_LONG)
            wave = _decode(container, stream, rate)
    except av.FFmpegError as problem:
        raise ValueError(f"not a recording that can be read ({problem.strerror})") from None
    if not wave.size:
        raise ValueError("an empty recording")
    if wave.size / rate < 0.95 * said - 0.25:
        raise ValueError(CUT_SHORT)
    if not np.isfinite(wave).all():
        raise ValueError(NON_FINITE_SAMPLES)
    return wave


def _decode(container: Any, stream: Any, rate: int) -> NDArray[np.float32]:
    import av

    resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)
    parts: list[NDArray[np.float32]] = []
    samples = 0
    for frame in container.decode(stream):
        for out in resampler.resample(frame):
            parts.append(out.to_ndarray()[0])
            samples += parts[-1].size
        if samples > MAX_SECONDS * rate:
            raise ValueError(TOO_LONG)
    parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros(0, "f")


def _seconds_said(container: Any, stream: Any, data: bytes) -> float:
    """How long the recording is by its own account; 0 if it does not say."""
    if container.format.name == "mp3":
        # Without a header of its own the length is FFmpeg's guess from the first bit rate.
        head = data[: 1 << 16]
        if not any(mark in head for mark in (b"Xing", b"Info", b"VBRI")):
            return 0.0
    if stream.duration is None or stream.time_base is None:
        return 0.0
    return float(stream.duration * stream.time_base)


def _wav_is_cut(data: bytes) -> bool:
    """Whether a WAV file ends before its head says; FFmpeg takes what is there.

    RF64 and BW64 (EBU Tech 3306) are WAV files with lengths of 64 bits in a chunk of their own.
    """
    if data[:4] not in (b"RIFF", b"RF64", b"BW64") or data[8:12] != b"WAVE":
        return False
    said = int.from_bytes(data[4:8], "little") + 8
    if len(data) < said < _UNKNOWN:
        return True
    place, long = 12, 0
    for _ in range(_MOST_CHUNKS):
        name, size = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if name == b"ds64":
            long = int.from_bytes(data[place + 16 : place + 24], "little")
        if name == b"data":
            if long:
                return len(data) < place + 8 + long
            return size < _UNKNOWN and len(data) + _HEAD < place + 8 + size
        place += 8 + size + size % 2
        if place >= len(data):
            break
    return False


def _ogg_is_cut(data: bytes) -> bool:
    """Whether an Ogg file (Opus, Vorbis) ends within a page; its length is that of the last page
    there is, so it never falls short of what it says. Layout of a page: RFC 3533, section 6.
    """
    if data[:4] != b"OggS":
        return False
    last = data.rfind(b"OggS")
    table = last + 27
    if len(data) < table:
        return True
    segments = data[table - 1]
    sizes = data[table : table + segments]
    return len(data) < table + segments + sum(sizes)


def _is_wav(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WAVE"


def compute_log_mel(
    wave: NDArray[np.float32], max_frames: int = MAX_FRAMES, trimmed: bool = True
) -> NDArray[np.float32]:
    """Trim to speech, scale to one level, and take normalised log-mel frames.

    Args:
        wave: samples at 16 kHz, mono.
        max_frames: what lies beyond is cut off.
        trimmed: cut the silence before and after; see ``trim``.

    Returns:
        float32 (F, 80), at most ``max_frames`` frames.

    Raises:
        ValueError: the recording is silent, or as loud as no numbers are.
    """
    with np.errstate(over="ignore"):  # refused below
        speech = apply_preemphasis(wave)
    speech = trim_silence(speech) if trimmed else np.pad(speech, (0, max(0, WINDOW - speech.size)))
    level = float(np.sqrt(np.mean(speech.astype(np.float64) ** 2)))
    if not np.isfinite(level):
        raise ValueError(NON_FINITE_SAMPLES)
    if level <= 1e-6:
        raise ValueError("a silent recording")
    power = _power(speech * (LEVEL / level))[:max_frames]
    # Of a filter's 257 weights six or so are not zero. A sparse product sums those, in order: it is
    # the same on every machine, whatever BLAS there is.
    mel = (_filters() @ power.T).T
    return ((np.log(mel + FLOOR) - MEAN) / DEVIATION).astype(np.float32, order="C")


def load_log_mel(
    data: bytes, max_frames: int = MAX_FRAMES, trimmed: bool = True
) -> NDArray[np.float32]:
    """A recording's bytes to frames, float32 (F, 80).

    Raises:
        ValueError: the bytes are no recording, or it is silent.
    """
    return compute_log_mel(decode_audio(data), max_frames, trimmed)


def apply_preemphasis(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weaken low frequencies: a first-order difference."""
    return wave[1:] - np.float32(EMPHASIS) * wave[:-1]


def trim_silence(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut what lies before and after the frames within ``TRIM_DB`` of the loudest one."""
    if wave.size <= WINDOW:
        return np.pad(wave, (0, WINDOW - wave.size))
    energy = (_windows(wave).astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (-TRIM_DB / 10))
    return wave[loud[0] * HOP : loud[-1] * HOP + WINDOW]


def _windows(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]


def _power(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    shaped = _windows(wave).astype(np.float64) * np.hanning(WINDOW)
    spectrum = np.fft.rfft(shaped, FFT)
    return spectrum.real**2 + spectrum.imag**2


@cache
def _filters() -> Any:
    """(80, 257) weights of the bins of a spectrum in each mel bin, a sparse matrix of SciPy's."""
    from scipy.sparse import csr_array

    def mel(hertz: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(LOW), mel(HIGH), MELS + 2)
    bins = mel(np.arange(FFT // 2 + 1) * RATE / FFT)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return csr_array(np.maximum(0.0, np.minimum(rising, falling)))
