"""Measuring which backend and which tile is fastest on the machine at hand."""

from pyeff.tune.tuner import DTYPES, Progress, save, tune

__all__ = ["DTYPES", "Progress", "save", "tune"]
