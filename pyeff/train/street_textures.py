"""Textures made of random numbers: tileable grey pictures that are looked up by world position."""

from functools import lru_cache

import numpy as np

SIDE = 256


def look_up(texture: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """A texture's values at some places.

    Args:
        texture: float32 ``[256, 256]``, which repeats in both directions.
        u: columns, in texture pixels, any shape.
        v: rows, of the same shape.

    Returns:
        float32 of that shape.
    """
    return texture[v.astype(np.int64) % SIDE, u.astype(np.int64) % SIDE]


@lru_cache(maxsize=16)
def cloudy(slope: float, seed: int) -> np.ndarray:
    """Noise whose amplitude falls with frequency as ``f ** -slope``.

    Args:
        slope: 0 is white noise, 0.5 gravel, 1 leaves, 1.7 clouds.
        seed: of the numbers.

    Returns:
        float32 ``[256, 256]`` with mean 0 and standard deviation 1; do not write to it.
    """
    white = np.random.default_rng(seed).standard_normal((SIDE, SIDE))
    rows, columns = np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None, :]
    frequency = np.hypot(rows, columns)
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(white) * frequency**-slope
    spectrum[0, 0] = 0.0
    values = np.fft.irfft2(spectrum, s=(SIDE, SIDE))
    return (values / values.std()).astype(np.float32)


@lru_cache(maxsize=8)
def bricks(seed: int) -> np.ndarray:
    """Rows of bricks, 32 x 16 texture pixels each, with light mortar between them.

    Args:
        seed: of the bricks' tones.

    Returns:
        float32 ``[256, 256]`` with mean near 0 and standard deviation near 1; do not write to it.
    """
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0:SIDE, 0:SIDE]
    row = v // 16
    u = (u + 16 * (row % 2)) % SIDE
    tones = rng.standard_normal((SIDE // 16, SIDE // 32)).astype(np.float32)
    values = tones[row, u // 32]
    values[(v % 16 < 2) | (u % 32 < 2)] = 1.6
    return values + 0.4 * cloudy(0.5, seed)


@lru_cache(maxsize=8)
def slabs(seed: int) -> np.ndarray:
    """Square stones, 32 texture pixels each, with dark joints between them.

    Args:
        seed: of the stones' tones.

    Returns:
        float32 ``[256, 256]`` with mean near 0 and standard deviation near 1; do not write to it.
    """
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[0:SIDE, 0:SIDE]
    tones = rng.standard_normal((SIDE // 32, SIDE // 32)).astype(np.float32)
    values = 0.6 * tones[v // 32, u // 32]
    values[(v % 32 < 2) | (u % 32 < 2)] = -2.0
    return values + 0.6 * cloudy(0.5, seed + 1)
