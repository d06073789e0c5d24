// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <pybind11/pybind11.h>

namespace qkv::python {

void register_alignment(pybind11::module_& m);
void register_attention(pybind11::module_& m);
void register_classics(pybind11::module_& m);
void register_device(pybind11::module_& m);
void register_direct(pybind11::module_& m);
void register_layers(pybind11::module_& m);
void register_masks(pybind11::module_& m);
void register_rotation(pybind11::module_& m);
void register_runtime(pybind11::module_& m);
void register_weights(pybind11::module_& m);

}  // namespace qkv::python
