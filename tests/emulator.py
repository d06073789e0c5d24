# SPDX-License-Identifier: Apache-2.0
"""The tests on a processor that qemu emulates (.ci/arm64)."""

from __future__ import annotations

import os

EMULATOR = os.environ.get(
    "QKV_EMULATOR", ""
).split()  # the command that starts a compiled program; else empty
SLOWER = 32 if EMULATOR else 1  # times, at least: for limits of time, and for work that is there to take some
