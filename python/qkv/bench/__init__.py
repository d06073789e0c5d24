# SPDX-License-Identifier: Apache-2.0
"""The benchmark engine of ``qkv bench`` and of the scripts in benchmarks/. In reading order:

=========  ==================================================================
problems   named shapes, their FLOPs and bytes
options    the words for masks, bias, layout and the like
peers      what runs them: our backends, NumPy, torch, ONNX Runtime, OpenVINO
measure    in turn with the machine's own limits, medians
formats    Markdown, JSON, CSV; the difference to an older file
plot       a picture of one run
machine    the facts that belong into every file
=========  ==================================================================

``import qkv`` loads nothing of it.
"""
