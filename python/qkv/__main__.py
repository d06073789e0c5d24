# SPDX-License-Identifier: Apache-2.0
"""``python -m qkv`` is the command ``qkv``."""

from qkv.cli import main

raise SystemExit(main())
