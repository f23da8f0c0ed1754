"""Loads the fat binary and launches its kernels through the CUDA driver API.

The kernels depend on no C++ ABI of torch this way, and the PTX in the binary runs on any
newer GPU: the same kernels are tested there.
"""

import ctypes
import functools
import struct
import threading
from pathlib import Path

import torch

FAT_BINARY = Path(__file__).parent.parent / "kernels" / "vllm_k80.fatbin"

# cuda.h: CU_LAUNCH_PARAM_END, _BUFFER_POINTER and _BUFFER_SIZE.
_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(result: int, what: str) -> None:
    if result:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(name))
        raise RuntimeError(f"{what}: CUDA driver error {result} ({(name.value or b'?').decode()})")


@functools.cache
def _module(device: int, path: Path) -> ctypes.c_void_p:
    """The fat binary ``path``, loaded into the primary context of ``device``."""
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # makes torch's context, the primary one, current
        module = ctypes.c_void_p()
        image = path.read_bytes()
        _check(
            _driver().cuModuleLoadData(ctypes.byref(module), image),
            f"loading {path.name} on CUDA device {device}",
        )
        return module


class Kernel:
    """One kernel of the fat binary on one device.

    Args:
        name: its ``extern "C"`` name.
        signature: one letter an argument: ``p`` pointer, ``i`` int32, ``f`` FP32.
        device: index of the CUDA device.
        path: of the fat binary.

    All arguments are packed into one buffer, laid out as in C, by one call, and cuLaunchKernel
    gets what never changes as ready ctypes objects: 1.7 us of Python a launch where filling an
    array of ctypes values takes 3.3 (2026-11-24, x86 server core). A lock keeps two threads from
    filling the buffer at the same time.
    """

    def __init__(self, name: str, signature: str, device: int, path: Path = FAT_BINARY) -> None:
        self._name = name
        self._device = device
        self._lock = threading.Lock()
        self._function = ctypes.c_void_p()
        _check(
            _driver().cuModuleGetFunction(
                ctypes.byref(self._function), _module(device, path), name.encode()
            ),
            f"looking up kernel {name}",
        )
        layout = struct.Struct(signature.replace("p", "P"))  # native sizes and alignment
        self._pack = layout.pack_into
        self._buffer = bytearray(layout.size)
        self._pinned = (ctypes.c_char * layout.size).from_buffer(self._buffer)  # keeps its address
        self._size = ctypes.c_size_t(layout.size)
        self._extra = (ctypes.c_void_p * 5)(
            _BUFFER_POINTER,
            ctypes.addressof(self._pinned),
            _BUFFER_SIZE,
            ctypes.addressof(self._size),
            _END,
        )
        # Without argtypes: ctypes takes the integers below as C integers at once.
        self._launch = _driver().cuLaunchKernel

    def launch(
        self,
        grid: int | tuple[int, int] | tuple[int, int, int],
        block: int,
        *arguments: float | None,
    ) -> None:
        """Launch on torch's current stream: ``grid`` blocks of ``block`` threads.

        ``grid`` is x, (x, y) or (x, y, z). A pointer that is None is null.
        """
        width, height, depth = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1)[:3]
        stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(self._device))
        if None in arguments:
            arguments = tuple(0 if argument is None else argument for argument in arguments)
        with self._lock:
            self._pack(self._buffer, 0, *arguments)
            result = self._launch(
                self._function, width, height, depth, block, 1, 1, 0, stream, None, self._extra
            )
        if result:
            _check(result, f"launching kernel {self._name}")


@functools.cache
def kernel(name: str, signature: str, device: int) -> Kernel:
    """The kernel of this name, looked up once a device."""
    return Kernel(name, signature, device)


@functools.cache
def available() -> bool:
    """Whether the compiled kernels are part of this installation."""
    return FAT_BINARY.exists()
