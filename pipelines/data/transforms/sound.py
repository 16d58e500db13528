"""Transform of audio: log-mel frames at 16 kHz, windows of 25 ms every 10 ms, 80 mel bins.

The scale is that of HTK (mel = 2595 log10(1 + f / 700)), with triangles of unit peak between 20 Hz
and 8 kHz, as in the filterbanks of Kaldi-style recognizers.

A transcript fits into its audio if a CTC alignment does. An alignment has a token per symbol, and a
blank between equal neighbours. A row without an alignment has an infinite loss, which training
replaces by zero: the row teaches nothing.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.data.transforms import containers

#: Increase it when a change of this file changes the log-mel values of any file.
VERSION = 2
#: Hz; ``WINDOW`` and ``HOP`` are in samples, ``LOW`` and ``HIGH`` in Hz.
RATE = 16_000
WINDOW = 400
HOP = 160
FFT = 512
MELS = 80
LOW, HIGH = 20.0, 8_000.0
#: Pre-emphasis: this fraction of the previous sample is subtracted. It removes direct current and
#: reduces hum, and it balances consonants against vowels. Without it, an offset of the recorder
#: hides the end of speech.
EMPHASIS = 0.97
#: Decibels: frames within this distance of the loudest frame are speech.
TRIM_DB = 25.0
#: Root mean square of normalized speech.
LEVEL = 0.1
#: Added to the power before the logarithm.
FLOOR = 1e-4
#: Of the log-mel values of the training audio of ``syllables``. One pair for all bins and corpora,
#: so that one stem can read all corpora.
MEAN, DEVIATION = -2.8, 3.2
#: Frames of the model's input, and seconds of a file that is decoded.
MAX_FRAMES = 192
MAX_SECONDS = 600
#: Hz: highest sampling rate of audio in memory.
MAX_RATE = 768_000
TOO_LONG = f"longer than {MAX_SECONDS} seconds"
CUT_SHORT = "cut short: the file ends before its audio does"
NON_FINITE_SAMPLES = "samples that are not finite (NaN or infinite)"
#: A writer to a pipe does not know the length and writes the maximum: ``ffmpeg`` writes all ones,
#: ``sox`` complete frames of slightly less than this half.
_UNKNOWN_LENGTH = 0x7FFF0000
#: Bytes: some writers count the header as samples.
_HEADER_SLACK = 64
#: Chunks of a WAV file that are searched for its samples.
_MAX_CHUNKS = 1_000
#: Bytes of a WAV file that FFmpeg probes. Its header states the format. By default FFmpeg searches
#: half a megabyte for other formats, which takes longer than decoding.
_PROBE_BYTES = 8_192


def decode_audio(data: bytes, rate: int = RATE) -> NDArray[np.float32]:
    """Decode an audio file of any format in ``containers.FORMATS``.

    Args:
        data: bytes of the file.
        rate: sampling rate of the result in Hz.

    Returns:
        float32 samples, mono, (samples,).

    Raises:
        ValueError: the bytes are not audio, or it is empty, truncated, longer than ten minutes, or
            has samples that are not finite.
    """
    import av

    if data[:256].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError("a web page, not audio")
    if _wav_is_cut(data) or _ogg_is_cut(data):
        raise ValueError(CUT_SHORT)
    options = {"probesize": str(_PROBE_BYTES)} if _is_wav(data) else {}
    try:
        with containers.open_container(data, **options) as container:
            stream = containers.first_stream(container.streams.audio, "no sound in the file")
            declared = _declared_seconds(container, stream, data)
            if declared > MAX_SECONDS:
                raise ValueError(TOO_LONG)
            wave = _resample(container.decode(stream), rate)
    except av.FFmpegError as error:
        raise ValueError(f"not audio that can be read ({error.strerror})") from None
    if not wave.size:
        raise ValueError("empty audio")
    if wave.size / rate < 0.95 * declared - 0.25:
        raise ValueError(CUT_SHORT)
    if not np.isfinite(wave).all():
        raise ValueError(NON_FINITE_SAMPLES)
    return wave


def resample_audio(samples: NDArray[Any], rate: int) -> NDArray[np.float32]:
    """Convert audio in memory to mono samples at ``RATE`` as :func:`decode_audio` does.

    Args:
        samples: float32 or float64 in [-1, 1], or int16; (samples,), (samples, 1) or (samples, 2).
        rate: their sampling rate in Hz.

    Raises:
        ValueError: another type or shape, or audio that :func:`decode_audio` rejects.
    """
    import av

    wave = np.asarray(samples)
    kinds = {np.dtype(np.int16): "s16", np.dtype(np.float32): "flt", np.dtype(np.float64): "dbl"}
    wave = wave[:, None] if wave.ndim == 1 else wave
    if wave.dtype not in kinds or wave.ndim != 2 or wave.shape[1] not in (1, 2):
        raise ValueError(
            f"samples are {wave.dtype} {np.shape(samples)}, expected float32, float64 or int16 of "
            "shape (samples,) or (samples, 2)"
        )
    if not len(wave):
        raise ValueError("empty audio")
    if not isinstance(rate, int | np.integer) or not 0 < rate <= MAX_RATE:
        raise ValueError(f"the sampling rate is {rate}, expected 1 to {MAX_RATE} Hz")
    if len(wave) > MAX_SECONDS * rate:
        raise ValueError(TOO_LONG)
    if not np.isfinite(wave).all():
        raise ValueError(NON_FINITE_SAMPLES)
    packed = np.ascontiguousarray(wave).reshape(1, -1)
    layout = "mono" if wave.shape[1] == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(packed, format=kinds[wave.dtype], layout=layout)
    frame.sample_rate = int(rate)
    return _resample([frame], RATE)


def _resample(frames: Iterable[Any], rate: int) -> NDArray[np.float32]:
    """Return mono samples: the mean of all channels, (samples,).

    FFmpeg would add the channels up, up to 3.4 times as loud as one of them.
    """
    import av

    resampler = av.AudioResampler(format="flt", rate=rate)
    parts: list[NDArray[np.float32]] = []
    samples = 0
    for frame in frames:
        for out in resampler.resample(frame):
            parts.append(_average_channels(out))
            samples += parts[-1].size
        if samples > MAX_SECONDS * rate:
            raise ValueError(TOO_LONG)
    parts += [_average_channels(out) for out in resampler.resample(None)]
    return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros(0, "f")


def _average_channels(frame: Any) -> NDArray[np.float32]:
    """Return the mean of the channels of a packed frame, (samples,)."""
    samples = frame.to_ndarray()[0]
    channels = frame.layout.nb_channels
    if channels == 1:
        return samples
    return samples.reshape(-1, channels).mean(axis=1, dtype=np.float32)


def _declared_seconds(container: Any, stream: Any, data: bytes) -> float:
    """Return the seconds that the file declares; 0 if it declares none."""
    if container.format.name == "mp3":
        # Without one of these headers, FFmpeg guesses the length from the first bit rate.
        head = data[: 1 << 16]
        if not any(mark in head for mark in (b"Xing", b"Info", b"VBRI")):
            return 0.0
    if stream.duration is None or stream.time_base is None:
        return 0.0
    return float(stream.duration * stream.time_base)


def _wav_is_cut(data: bytes) -> bool:
    """Return whether a WAV file is shorter than its header declares; FFmpeg would accept it.

    RF64 and BW64 (EBU Tech 3306) are WAV files with 64-bit lengths in a separate chunk.
    """
    if data[:4] not in (b"RIFF", b"RF64", b"BW64") or data[8:12] != b"WAVE":
        return False
    declared = int.from_bytes(data[4:8], "little") + 8
    if len(data) < declared < _UNKNOWN_LENGTH:
        return True
    position, long_size = 12, 0
    for _ in range(_MAX_CHUNKS):
        name, size = (
            data[position : position + 4],
            int.from_bytes(data[position + 4 : position + 8], "little"),
        )
        if name == b"ds64":
            long_size = int.from_bytes(data[position + 16 : position + 24], "little")
        if name == b"data":
            if long_size:
                return len(data) < position + 8 + long_size
            return size < _UNKNOWN_LENGTH and len(data) + _HEADER_SLACK < position + 8 + size
        position += 8 + size + size % 2
        if position >= len(data):
            break
    return False


def _ogg_is_cut(data: bytes) -> bool:
    """Return whether an Ogg file (Opus, Vorbis) ends inside a page.

    FFmpeg takes its length from the last page, so it always equals the declared one. Layout of a
    page: RFC 3533, section 6.
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
    """Trim audio to speech, normalize its level, and compute normalized log-mel frames.

    Args:
        wave: samples at 16 kHz, mono, (samples,).
        max_frames: later frames are dropped.
        trimmed: remove silence at both ends; see :func:`trim_silence`.

    Returns:
        float32 (F, 80), at most ``max_frames`` frames.

    Raises:
        ValueError: the audio is silent, or its level is not finite.
    """
    with np.errstate(over="ignore"):  # rejected below
        speech = apply_preemphasis(wave)
    speech = trim_silence(speech) if trimmed else np.pad(speech, (0, max(0, WINDOW - speech.size)))
    level = float(np.sqrt(np.mean(speech.astype(np.float64) ** 2)))
    if not np.isfinite(level):
        raise ValueError(NON_FINITE_SAMPLES)
    if level <= 1e-6:
        raise ValueError("silent audio")
    power = _power_spectrum(speech * (LEVEL / level))[:max_frames]
    # About six of a filter's 257 weights are not zero. A sparse product sums them in order, so the
    # result is the same on every machine and with any BLAS.
    mel = (_mel_filters() @ power.T).T
    return ((np.log(mel + FLOOR) - MEAN) / DEVIATION).astype(np.float32, order="C")


def load_log_mel(
    data: bytes, max_frames: int = MAX_FRAMES, trimmed: bool = True
) -> NDArray[np.float32]:
    """Decode an audio file and compute its log-mel frames.

    Args:
        data: bytes of the file.
        max_frames: later frames are dropped.
        trimmed: remove silence at both ends.

    Returns:
        float32 (F, 80).

    Raises:
        ValueError: the bytes are not audio, or it is silent.
    """
    return compute_log_mel(decode_audio(data), max_frames, trimmed)


def apply_preemphasis(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Attenuate low frequencies by a first-order difference."""
    return wave[1:] - np.float32(EMPHASIS) * wave[:-1]


def trim_silence(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """Remove both ends up to the frames within ``TRIM_DB`` of the loudest frame."""
    if wave.size <= WINDOW:
        return np.pad(wave, (0, WINDOW - wave.size))
    energy = (_split_windows(wave).astype(np.float64) ** 2).mean(axis=1)
    loud = np.flatnonzero(energy >= energy.max() * 10 ** (-TRIM_DB / 10))
    return wave[loud[0] * HOP : loud[-1] * HOP + WINDOW]


def _split_windows(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.lib.stride_tricks.sliding_window_view(wave, WINDOW)[::HOP]


def _power_spectrum(wave: NDArray[np.float32]) -> NDArray[np.float64]:
    tapered = _split_windows(wave).astype(np.float64) * np.hanning(WINDOW)
    spectrum = np.fft.rfft(tapered, FFT)
    return spectrum.real**2 + spectrum.imag**2


@cache
def _mel_filters() -> Any:
    """Return the weights of the spectrum in each mel bin, a sparse SciPy matrix (80, 257)."""
    from scipy.sparse import csr_array

    def mel(hertz: NDArray[np.float64] | float) -> NDArray[np.float64]:
        return 2595.0 * np.log10(1.0 + np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(LOW), mel(HIGH), MELS + 2)
    bins = mel(np.arange(FFT // 2 + 1) * RATE / FFT)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return csr_array(np.maximum(0.0, np.minimum(rising, falling)))


#: Reasons of rejected rows.
TOO_SHORT = "the transcript has more symbols than the audio has frames"
NO_SYMBOL = "the transcript has a symbol that the corpus does not list"


def count_alignment_tokens(symbols: pa.ListArray) -> np.ndarray:
    """Return the least number of tokens that can hold each row's symbols, (B,).

    Args:
        symbols: list<int> per row; null counts as an empty list.
    """
    # Nulls and slices are resolved first, so that offsets and values belong together.
    flat = symbols.flatten().to_numpy(zero_copy_only=False)
    lengths = pc.fill_null(pc.list_value_length(symbols), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    # Equal neighbours before each position; pairs across two rows are left out below.
    equal = np.concatenate([[0], np.cumsum(flat[1:] == flat[:-1], dtype=np.int64), [0]])
    repeats = np.where(lengths > 0, equal[np.maximum(ends - 1, 0)] - equal[starts], 0)
    return lengths + repeats


def find_ctc_problems(symbols: pa.ListArray, frames: np.ndarray) -> list[str | None]:
    """Return the reason to reject each row, or None for a good row.

    A model joins several frames to a token, so more rows may not fit into it. A row with more
    symbols than frames fits into no model.

    Args:
        symbols: list<int> per row, from 1; 0 is the blank.
        frames: (B,) frames of each row.
    """
    reasons: list[str | None] = [None] * len(symbols)
    for row in np.flatnonzero(count_alignment_tokens(symbols) > frames):
        reasons[row] = TOO_SHORT
    invalid = np.flatnonzero(symbols.flatten().to_numpy(zero_copy_only=False) < 1)
    if len(invalid):
        for row in pc.list_parent_indices(symbols).take(pa.array(invalid)).to_pylist():
            reasons[row] = NO_SYMBOL
    return reasons
