"""llama.cpp's products with its own types, through the libraries that the package llama-cpp-python brings.

A product is a graph of `ggml_mul_mat` nodes, one for each expert, which GGML's CPU backend computes; weights are in the
arrangement that it prefers (its buffer type CPU_REPACK where that takes the type), as llama.cpp loads them. x is
float32; GGML rounds it to 8 bits itself. Declarations are those of ggml.h, ggml-backend.h and ggml-cpu.h.
"""

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbit.bench.matrices import Statistics
from halfbit.errors import Unsupported

# enum ggml_type
TYPES = {"TQ1_0": 34, "TQ2_0": 35, "IQ1_S": 19, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12}
TERNARY = ("TQ1_0", "TQ2_0")
F32 = 0
# weights of a block of all these types
BLOCK = 256
# rows that are drawn and quantized, which takes up to a second per million weights; taller matrices repeat them
DRAWN = 32
INSTALL = "pip install llama-cpp-python (compiles for some ten minutes)"


# GGML tells of every tensor that it arranges
_Log = CFUNCTYPE(None, c_int, c_char_p, c_void_p)
_SILENT = _Log(lambda *_: None)


class _Params(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _Traits(ctypes.Structure):
    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)),
    ]


# result, arguments
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [_Log, c_void_p]),
    "ggml_init": (c_void_p, [_Params]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_get_type_traits": (POINTER(_Traits), [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_dev_backend_reg": (c_void_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


@cache
def library() -> Any:
    """GGML with its functions declared. Raises Unsupported where it is not installed, or another than is known."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise Unsupported(f"--against llama.cpp: llama-cpp-python is not installed; {INSTALL}")
    folder = Path(spec.origin).parent / "lib"
    found = sorted(p for p in folder.glob("*ggml.*") if p.suffix in (".so", ".dylib", ".dll"))
    if not found:
        raise Unsupported(f"--against llama.cpp: there is no libggml in {folder}; {INSTALL}")
    try:
        ggml = ctypes.CDLL(str(found[0]))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(ggml, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise Unsupported(f"--against llama.cpp: {found[0]} cannot be used: {error}; {INSTALL}") from None
    ggml.ggml_log_set(_SILENT, None)
    return ggml


def check_shape(rows: int, columns: int) -> None:
    """Raise Unsupported for a matrix whose rows are not whole blocks."""
    if columns % BLOCK:
        raise Unsupported(
            f"--against llama.cpp: columns must be a multiple of {BLOCK}, got {rows}x{columns}; leave llama.cpp out"
        )


@cache
def _backend() -> int:
    return library().ggml_backend_cpu_init()


def quantized(name: str, rows: int, columns: int, of: Statistics) -> Tensor:
    """Random weights in one of llama.cpp's types, uint8 `[rows, bytes of a row]`."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.randn(min(rows, DRAWN), columns, generator=random)
    if name in TERNARY:
        drawn = drawn.sign() * (torch.rand(drawn.shape, generator=random) >= of.zeros)
    ggml, importance = library(), torch.ones(columns)
    some = torch.zeros(len(drawn), ggml.ggml_row_size(TYPES[name], columns), dtype=torch.uint8)
    shape = 0, len(drawn), columns
    ggml.ggml_quantize_chunk(TYPES[name], drawn.data_ptr(), some.data_ptr(), *shape, importance.data_ptr())
    return some.repeat(-(-rows // len(drawn)), 1)[:rows].contiguous()


class Llama:
    """`bench.Contestant`: one of llama.cpp's types. Raises Unsupported where columns are not whole blocks."""

    exact = False  # x is rounded to 8 bits

    def __init__(self, name: str, rows: int, columns: int, experts: int, of: Statistics):
        check_shape(rows, columns)
        self._ggml, self.what, self._type = library(), f"llama.cpp {name}", TYPES[name]
        self._rows, self._columns, self._experts = rows, columns, experts
        self._one = quantized(name, rows, columns, of)
        self.nbytes, self.bits = experts * self._one.numel(), 8 * self._one.shape[1] / columns
        self._held: list[list[int]] = []
        self._graphs = _Context(self._ggml, 0, 0)

    def weights(self) -> Tensor:
        w = torch.empty(self._rows, self._columns)
        to_float = self._ggml.ggml_get_type_traits(self._type).contents.to_float
        to_float(self._one.data_ptr(), ctypes.cast(w.data_ptr(), POINTER(c_float)), w.numel())
        return w

    def hold(self, copies: int) -> None:
        self._weights = self._arranged(copies) or self._allocated(copies, 0)
        assert self._weights is not None

    def _arranged(self, copies: int) -> "_Context | None":
        """The weights as CPU_REPACK has them; None where it does not take them."""
        ggml, device = self._ggml, self._ggml.ggml_backend_get_device(_backend())
        registry = ggml.ggml_backend_dev_backend_reg(device)
        address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        types = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        for i in range(8):
            if not types or not types[i]:
                return None
            if ggml.ggml_backend_buft_name(types[i]) == b"CPU_REPACK":
                return self._allocated(copies, types[i])
        return None

    def _allocated(self, copies: int, buffer_type: int) -> "_Context | None":
        """All copies in a buffer of that type, or in the CPU's own; None where the type does not take them."""
        ggml = self._ggml
        context = _Context(ggml, copies * self._experts + 2, 0)
        tensor = [context.tensor(self._type, self._columns, self._rows) for _ in range(copies * self._experts)]
        context.allocate(buffer_type or ggml.ggml_backend_get_default_buffer_type(_backend()))
        if buffer_type:
            x = context.tensor(F32, self._columns, 1)
            product = ggml.ggml_mul_mat(context.pointer, tensor[0], x)
            if not ggml.ggml_backend_dev_supports_op(ggml.ggml_backend_get_device(_backend()), product):
                return None
        for t in tensor:
            ggml.ggml_backend_tensor_set(t, self._one.data_ptr(), 0, ggml.ggml_nbytes(t))
        n = self._experts
        self._held = [tensor[i * n : (i + 1) * n] for i in range(copies)]
        return context

    def calls(self, x: Tensor) -> list[Callable[[], Tensor]]:
        ggml, n = self._ggml, self._experts
        ggml.ggml_backend_cpu_set_n_threads(_backend(), torch.get_num_threads())
        inputs, tokens = x.float().contiguous(), x.shape[0] // n
        self._graphs = context = _Context(ggml, 2 * n * len(self._held) + n, len(self._held), nodes=2 * n)
        xs = [context.tensor(F32, self._columns, tokens) for _ in range(n)]
        graphs, outputs = [], []
        for weights in self._held:
            outputs.append([ggml.ggml_mul_mat(context.pointer, w, t) for w, t in zip(weights, xs, strict=True)])
            graphs.append(ggml.ggml_new_graph_custom(context.pointer, 2 * n, False))
            for y in outputs[-1]:
                ggml.ggml_build_forward_expand(graphs[-1], y)
        context.allocate(ggml.ggml_backend_get_default_buffer_type(_backend()))
        for t, part in zip(xs, inputs.chunk(n), strict=True):
            ctypes.memmove(ggml.ggml_get_data(t), part.data_ptr(), 4 * part.numel())
        return [lambda g=graph, ys=y: self._computed(g, ys, tokens) for graph, y in zip(graphs, outputs, strict=True)]

    def _computed(self, graph: int, outputs: list[int], tokens: int) -> Tensor:
        if status := self._ggml.ggml_backend_graph_compute(_backend(), graph):
            raise Unsupported(f"{self.what}: GGML does not compute this product, status {status}")
        y = torch.empty(self._experts, tokens, self._rows)
        for part, output in zip(y, outputs, strict=True):
            ctypes.memmove(part.data_ptr(), self._ggml.ggml_get_data(output), 4 * part.numel())
        return y.view(-1, self._rows)


class _Context:
    """A GGML context for so many tensors and graphs, and the buffer of its tensors; freed with this object."""

    def __init__(self, ggml: Any, tensors: int, graphs: int, nodes: int = 1):
        self._ggml, self._buffer = ggml, None
        size = (tensors + 1) * ggml.ggml_tensor_overhead() + graphs * ggml.ggml_graph_overhead_custom(nodes, False)
        self.pointer = ggml.ggml_init(_Params(size, None, True))

    def tensor(self, kind: int, columns: int, rows: int) -> int:
        return self._ggml.ggml_new_tensor_2d(self.pointer, kind, columns, rows)

    def allocate(self, buffer_type: int) -> None:
        """Memory for all tensors that have none."""
        self._buffer = self._ggml.ggml_backend_alloc_ctx_tensors_from_buft(self.pointer, buffer_type)

    def __del__(self) -> None:
        if self._buffer:
            self._ggml.ggml_backend_buffer_free(self._buffer)
        self._ggml.ggml_free(self.pointer)
