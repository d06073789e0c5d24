# SPDX-License-Identifier: Apache-2.0
"""What runs a problem: our backends, and the peers that are installed.

A runner takes a problem and its arrays once, outside the clock, and gives back a call without arguments. Each
peer gets the arrays in the layout it likes best, as many threads as we have, and returns (B, Hq, Sq, Dv).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import numpy as np

import qkv

from .options import additive
from .problems import Array, Problem

Call = Callable[[], Any]


class Unable(Exception):
    """Why a runner leaves a problem out."""


def without(problem: Problem, *names: str) -> None:
    """Raise Unable if the problem has one of these keywords."""
    for name in names:
        if name in problem.keywords:
            raise Unable(f"run here without {name}")


class Runner:
    """One way to compute attention."""

    name: str
    peer = True

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        """The call to be timed; Unable if this runner cannot do it."""
        raise NotImplementedError

    def result(self, value: Any) -> Array:
        """What the call returned, as an array (B, Hq, Sq, Dv)."""
        return np.asarray(value)


class Ours(Runner):
    """A backend of this library."""

    peer = False

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.name = f"qkv {backend}"

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        if self.backend == "reference" and problem.flops > 2e9:
            raise Unable("the reference is not made for problems of this size")
        options = {**problem.keywords, "backend": self.backend}
        self._heads_last = options.get("layout") == "BSHD"
        if self._heads_last:
            q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)) for x in (q, k, v))
        if problem.limit == "call" and not problem.words and not problem.causal:  # as one writes it
            backend = self.backend
            return lambda: qkv.attention(q, k, v, backend=backend)
        if problem.limit != "call":
            options["out"] = np.empty((*q.shape[:-1], problem.Dv), q.dtype)
        return lambda: qkv.attention(q, k, v, **options)

    def result(self, value: Any) -> Array:
        out = np.asarray(value)
        return out.swapaxes(1, 2) if self._heads_last else out


class OnDevice(Runner):
    """The CUDA backend with its arrays in GPU memory: what is left without the copies."""

    peer = False
    name = "qkv cuda, arrays there"

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        without(problem, "layout", "mask", "bias", "normalizer", "dropout_p")
        there = [qkv.to_device(x) for x in (q, k, v)]
        out = qkv.to_device(np.empty((*q.shape[:-1], problem.Dv), q.dtype))

        def call() -> Any:
            qkv.attention(*there, **problem.keywords, out=out)
            qkv.synchronize()
            return out

        return call

    def result(self, value: Any) -> Array:
        return np.asarray(value.numpy())


class NumPy(Runner):
    """Attention as one writes it in NumPy, in place, the products by its BLAS."""

    name = f"NumPy {np.__version__}"

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        group = problem.Hq // problem.Hkv
        narrow = problem.dtype in ("f16", "bf16")
        if problem.B * problem.Hq * problem.Sq * problem.Sk > 1 << 29:
            raise Unable("its score matrix would be too large")
        without(problem, "normalizer", "dropout_p")
        mask, softcap = additive(problem), problem.keywords.get("softcap", 0.0)
        if mask is not None:
            mask = mask.reshape(-1, group if mask.ndim == 3 else 1, *mask.shape[-2:])
        hidden = ~mask if mask is not None and mask.dtype == np.bool_ else None
        bias = mask if hidden is None else None
        # The heads of a group share K and V: one product for all of them.
        shape = (problem.B, problem.Hkv, group, problem.Sq, problem.D)
        q = q.reshape(shape)
        k, v = k[:, :, None], v[:, :, None]
        scale = problem.D**-0.5

        def call() -> Array:
            a, b, c = (x.astype(np.float32) for x in (q, k, v)) if narrow else (q, k, v)
            s = a @ b.swapaxes(-1, -2)
            s *= s.dtype.type(scale)
            if softcap:
                s /= softcap
                np.tanh(s, out=s)
                s *= softcap
            if bias is not None:
                s += bias
            if hidden is not None:
                np.copyto(s, -np.inf, where=hidden)
            s -= s.max(axis=-1, keepdims=True)
            np.exp(s, out=s)
            s /= s.sum(axis=-1, keepdims=True)
            o: Array = s @ c
            return o.astype(q.dtype) if narrow else o

        return call

    def result(self, value: Any) -> Array:
        o: Array = value
        return o.reshape(o.shape[0], -1, *o.shape[3:])


class Torch(Runner):
    """torch.nn.functional.scaled_dot_product_attention, in inference mode."""

    def __init__(self, threads: int) -> None:
        self.torch: Any = importlib.import_module("torch")
        self.torch.set_num_threads(threads)
        self.name = f"torch {metadata.version('torch').split('+')[0]}"

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        torch = self.torch
        tensors = [self._tensor(problem, x) for x in (q, k, v)]
        without(problem, "softcap", "normalizer", "dropout_p")
        causal, mask = causal_or_mask(problem)
        options: dict[str, Any] = {"is_causal": True} if causal else {}
        if mask is not None:
            bias = torch.from_numpy(mask)
            options["attn_mask"] = bias if mask.dtype == np.bool_ else bias.to(tensors[0].dtype)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        if problem.Hq != problem.Hkv:
            options["enable_gqa"] = True

        def call() -> Any:
            return sdpa(*tensors, **options)

        def quiet() -> Any:
            with torch.inference_mode():
                return sdpa(*tensors, **options)

        # Entering the mode costs as much as a small call: there the grad-free tensors do as well.
        return call if problem.limit == "call" else quiet

    def _tensor(self, problem: Problem, x: Array) -> Any:
        if problem.dtype == "bf16":
            return self.torch.from_numpy(x.view(np.int16)).view(self.torch.bfloat16)
        return self.torch.from_numpy(x)

    def result(self, value: Any) -> Array:
        return np.asarray(value.to(self.torch.float64).numpy())


class OnnxRuntime(Runner):
    """Its fastest operator for each problem: MultiHeadAttention, GroupQueryAttention, or Attention-23."""

    def __init__(self, threads: int) -> None:
        self.ort: Any = importlib.import_module("onnxruntime")
        self.helper: Any = importlib.import_module("onnx.helper")
        self.threads = threads
        self.name = f"ONNX Runtime {metadata.version('onnxruntime')}"

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        if problem.dtype != "f32" or problem.Dv != problem.D:
            raise Unable("run here in f32 with D = Dv only")
        without(problem, "normalizer", "dropout_p")
        causal, mask = causal_or_mask(problem)
        softcap = problem.keywords.get("softcap", 0.0)
        packed = problem.Sq == problem.Sk and mask is None and not softcap
        domain, op = "com.microsoft", "MultiHeadAttention"
        inputs = {"q": q, "k": k, "v": v}
        attributes: dict[str, Any] = {"num_heads": problem.Hq}
        if packed:
            inputs = {name: _heads_last(x) for name, x in inputs.items()}
        if packed and (causal or problem.Hq != problem.Hkv):
            if not causal:
                packed, inputs = False, {"q": q, "k": k, "v": v}
            else:
                op = "GroupQueryAttention"
                attributes["kv_num_heads"] = problem.Hkv
                none = np.zeros((problem.B, problem.Hkv, 0, problem.D), np.float32)
                inputs |= {"past_k": none, "past_v": none}
                inputs["last"] = np.full(problem.B, problem.Sk - 1, np.int32)
                inputs["total"] = np.array(problem.Sk, np.int32)
        if not packed:
            domain, op = "", "Attention"
            attributes = {"is_causal": int(causal), "softcap": softcap}
            if mask is not None:
                inputs["mask"] = mask
        outputs = ["o", "present_k", "present_v"] if op == "GroupQueryAttention" else ["o"]
        session = self._session(domain, op, inputs, outputs, attributes)
        binding = session.io_binding()
        for name, x in inputs.items():
            binding.bind_cpu_input(name, x)
        for name in outputs:
            binding.bind_output(name)
        self._heads = problem.Hq if packed else 0

        def call() -> Any:
            session.run_with_iobinding(binding)
            return binding

        return call

    def _session(
        self, domain: str, op: str, inputs: dict[str, Array], outputs: list[str], attributes: dict[str, Any]
    ) -> Any:
        h = self.helper
        kinds = {np.dtype(np.float32): 1, np.dtype(np.int32): 6, np.dtype(np.bool_): 9}  # of TensorProto
        node = h.make_node(op, list(inputs), outputs, domain=domain, **attributes)
        graph = h.make_graph(
            [node],
            "attention",
            [h.make_tensor_value_info(name, kinds[x.dtype], x.shape) for name, x in inputs.items()],
            [h.make_tensor_value_info(name, 1, None) for name in outputs],
        )
        opsets = [h.make_opsetid("", 23), h.make_opsetid("com.microsoft", 1)]
        model = h.make_model(graph, opset_imports=opsets, ir_version=11)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        try:
            return self.ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions derive from Exception alone
            raise Unable(str(error).splitlines()[0]) from None

    def result(self, value: Any) -> Array:
        o: Array = value.copy_outputs_to_cpu()[0]
        if self._heads:
            o = o.reshape(*o.shape[:2], self._heads, -1).swapaxes(1, 2)
        return o


def _heads_last(x: Array) -> Array:
    """(B, H, S, D) -> (B, S, H D)"""
    return np.ascontiguousarray(x.swapaxes(1, 2)).reshape(x.shape[0], x.shape[2], -1)


def causal_or_mask(problem: Problem) -> tuple[bool, Array | None]:
    """Whether a peer's own causal mask says it all, or the mask that does."""
    if not problem.causal or set(problem.keywords) - {"causal", "softcap", "layout"}:
        return False, additive(problem)
    if problem.Sq != problem.Sk:
        raise Unable("its causal mask is aligned at the top left")
    return True, None


class OpenVINO(Runner):
    """Its operator ScaledDotProductAttention, compiled for the CPU in the problem's dtype."""

    def __init__(self, threads: int) -> None:
        self.ov: Any = importlib.import_module("openvino")
        self.op: Any = importlib.import_module("openvino.opset13")
        self.threads = threads
        self.name = f"OpenVINO {metadata.version('openvino')}"

    def prepare(self, problem: Problem, q: Array, k: Array, v: Array) -> Call:
        ov, op = self.ov, self.op
        if problem.dtype == "f64":
            raise Unable("it has no float64")
        without(problem, "softcap", "normalizer", "dropout_p")
        causal, mask = causal_or_mask(problem)
        if problem.Hq != problem.Hkv:
            if causal or mask is not None:
                raise Unable("grouped heads are run here without a mask")
            q = q.reshape(problem.B, problem.Hkv, -1, problem.D)  # a group's heads as rows of one
        arrays = (
            [q, k, v] if mask is None else [q, k, v, mask if mask.dtype == np.bool_ else mask.astype(q.dtype)]
        )
        kind = getattr(ov.Type, problem.dtype)
        tensors = []
        for x in arrays:
            bits = x.view(np.uint16) if kind == ov.Type.bf16 and x.dtype != np.bool_ else x
            tensors.append(ov.Tensor(bits, x.shape, ov.Type.boolean if x.dtype == np.bool_ else kind))
        inputs = [op.parameter(list(x.shape), x.element_type) for x in tensors]
        node = op.scaled_dot_product_attention(*inputs, causal=causal)
        options = {"INFERENCE_NUM_THREADS": self.threads, "INFERENCE_PRECISION_HINT": kind.to_string(),
                   "PERFORMANCE_HINT": "LATENCY"}  # fmt: skip
        request = ov.compile_model(ov.Model([node], inputs), "CPU", options).create_infer_request()
        for place, tensor in enumerate(tensors):
            request.set_input_tensor(place, tensor)
        self._shape, self._dtype = (problem.B, problem.Hq, problem.Sq, problem.Dv), q.dtype

        def call(keep: Any = arrays) -> Any:  # the tensors point into them
            request.infer()
            return request.get_output_tensor()

        return call

    def result(self, value: Any) -> Array:
        bits: Array = np.array(value.data)
        return bits.view(self._dtype).reshape(self._shape)  # of bf16 it says float16


PEERS: dict[str, Callable[[int], Runner]] = {
    "numpy": lambda threads: NumPy(),
    "torch": Torch,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
}


def runners(
    backends: list[str] | None, peers: list[str] | None, threads: int
) -> tuple[list[Runner], list[str]]:
    """The runners, ours first, and a line for each that is left out.

    Parameters
    ----------
    backends : list of str, optional
        Default: those that are available, but for the reference.
    peers : list of str, optional
        Names in `PEERS`; default: those that are installed.
    threads : int
    """
    chosen: list[Runner] = []
    notes: list[str] = []
    for backend in qkv.backends():
        if backends is None and backend.name == "reference":
            continue
        if backends is None or backend.name in backends:
            if backend.available:
                chosen.append(Ours(backend.name))
                if backend.name == "cuda":
                    chosen.append(OnDevice())
            else:
                notes.append(f"{backend.name}: {backend.reason}")
    for name in PEERS if peers is None else peers:
        try:
            chosen.append(PEERS[name](threads))
        except (ImportError, OSError) as error:
            notes.append(f"{name}: {error}")
    return chosen, notes


@contextmanager
def thread_limits(threads: int) -> Iterator[list[str]]:
    """The same number of threads for us and for NumPy's BLAS; yields what could not be set."""
    before = qkv.get_num_threads()
    qkv.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        yield ["threadpoolctl is not installed: NumPy's BLAS takes as many threads as it likes"]
    else:
        with threadpool_limits(threads):
            yield []
    finally:
        qkv.set_num_threads(before)
