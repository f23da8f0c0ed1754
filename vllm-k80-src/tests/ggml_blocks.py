"""GGUF tensors for tests."""

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

# Where a block of each K-quant has its FP16 factors of scales and of minimums, and how far apart
# weights are whose bits are all random, with a factor of 1.
_FACTORS = {Kind.Q4_K: (0, 2, 260), Kind.Q5_K: (0, 2, 535), Kind.Q6_K: (208, None, 1366)}


def quantized(kind: Kind, rows: int, columns: int, seed: int = 0, spread: float = 1) -> np.ndarray:
    """[rows, bytes a row] of about normal values, by gguf's own code.

    It has none for K-quants, whose blocks are random: every pattern of bits is one. Their factors
    are chosen so that the weights are about a mean of 0.
    """
    random = np.random.RandomState(seed)
    if kind not in _FACTORS:
        values = random.standard_normal((rows, columns)).astype(np.float32)
        return gguf.quantize(spread * values, kind)
    of_block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = random.randint(0, 256, (rows, columns // of_block, size)).astype(np.uint8)
    scales, minimums, wide = _FACTORS[kind]
    factor = spread / wide * random.uniform(0.5, 1.5, raw.shape[:2])

    def put(at: int, values: np.ndarray) -> None:
        raw[..., at : at + 2] = values.astype(np.float16)[..., None].view(np.uint8)

    put(scales, factor)
    if minimums is not None:
        put(minimums, factor * (7.5 if kind == Kind.Q4_K else 15.5))
    return raw.reshape(rows, -1)
