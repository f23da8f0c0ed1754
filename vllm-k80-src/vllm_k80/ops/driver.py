"""Loads the fat binary and launches its kernels through the CUDA driver API.

The kernels depend on no C++ ABI of torch this way, and the PTX in the binary runs on any
newer GPU: the same kernels are tested there.
"""

import ctypes
import functools
import threading
from pathlib import Path

import torch

FAT_BINARY = Path(__file__).parent.parent / "kernels" / "vllm_k80.fatbin"

_ARGUMENT_TYPES: dict[str, type[ctypes.c_void_p] | type[ctypes.c_int] | type[ctypes.c_float]] = {
    "p": ctypes.c_void_p,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
}


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuLaunchKernel.argtypes = [
        ctypes.c_void_p,
        *[ctypes.c_uint] * 7,
        *[ctypes.c_void_p] * 3,
    ]
    return driver


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

    The argument array is made once, so a launch costs no allocation; a lock keeps two threads
    from filling it at the same time.
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
        self._values = [_ARGUMENT_TYPES[letter]() for letter in signature]
        addresses = [ctypes.addressof(value) for value in self._values]
        self._arguments = (ctypes.c_void_p * len(addresses))(*addresses)

    def launch(
        self,
        grid: int | tuple[int, int] | tuple[int, int, int],
        block: int,
        *arguments: float | None,
    ) -> None:
        """Launch on torch's current stream: ``grid`` blocks of ``block`` threads.

        ``grid`` is x, (x, y) or (x, y, z). A pointer that is None is null.
        """
        width, height, depth = (*(grid if isinstance(grid, tuple) else (grid,)), 1, 1)[:3]
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        with self._lock:
            for value, argument in zip(self._values, arguments, strict=True):
                value.value = argument
            result = _driver().cuLaunchKernel(
                self._function, width, height, depth, block, 1, 1, 0, stream, self._arguments, None
            )
        _check(result, f"launching kernel {self._name}")


@functools.cache
def kernel(name: str, signature: str, device: int) -> Kernel:
    """The kernel of this name, looked up once a device."""
    return Kernel(name, signature, device)


@functools.cache
def available() -> bool:
    """Whether the compiled kernels are part of this installation."""
    return FAT_BINARY.exists()
