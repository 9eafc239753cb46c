"""Convolution networks that do less work per image and are really faster for it."""
