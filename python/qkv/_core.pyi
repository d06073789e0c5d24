# SPDX-License-Identifier: Apache-2.0
"""The extension module. Private: its functions take positional arguments only and may change at any time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

class MaskProgram:
    """A compiled mask: the postfix program of (op, a, b, data), checked once."""

    def __init__(self, steps: list[tuple[int, int, int, NDArray[np.int64] | None]], /) -> None: ...

def mask_dense(program: MaskProgram, Sq: int, Sk: int, q_offset: int, /) -> NDArray[np.bool_]: ...
def mask_cover(program: MaskProgram, p0: int, p1: int, j0: int, j1: int, /) -> int: ...
def __getattr__(name: str, /) -> Any: ...
