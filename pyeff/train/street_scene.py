"""One procedural street scene: a camera, a ground plane, rows of houses, things that stand about.

Everything has its size in metres and is projected; a depth buffer decides what hides what. The
classes are CamVid's (:data:`pyeff.train.camvid.CLASSES`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pyeff._extras import require
from pyeff.train.street_textures import bricks, cloudy, look_up, slabs

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(11)
_FAR = 1000.0
_EPSILON = 1e-4
_PURPOSE = "to draw street scenes"

Point = tuple[float, float]
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Camera:
    """Where the picture is taken from.

    Attributes:
        focal: in pixels.
        centre: of the picture's vanishing point, (column, row).
        eye: height above the road, in metres.
        turn: tangent of the angle to the road's direction.
        roll: tangent of the picture's tilt.
    """

    focal: float
    centre: Point
    eye: float
    turn: float
    roll: float

    def rays(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Metres to the right and downwards for each metre ahead, float32 ``[H, W]`` each."""
        x = np.arange(width, dtype=np.float32)[None, :] + 0.5 - self.centre[0]
        y = np.arange(height, dtype=np.float32)[:, None] + 0.5 - self.centre[1]
        return (x + self.roll * y) / self.focal + self.turn, (y - self.roll * x) / self.focal

    def project(self, x: float, y: float, z: float) -> Point:
        """The pixel (column, row) of a place: ``x`` to the right, ``y`` above ground, ``z`` ahead.

        The tilt, of a degree at most, is left out: what stands, stands upright.
        """
        right, down = x / z - self.turn, (self.eye - y) / z
        return right * self.focal + self.centre[0], down * self.focal + self.centre[1]


@dataclass(frozen=True)
class Street:
    """Where things are across the street, in metres to the right of the camera.

    Attributes:
        left: edge of the road.
        right: the other edge.
        left_wall: line of the houses.
        right_wall: the other line.
    """

    left: float
    right: float
    left_wall: float
    right_wall: float

    @property
    def middle(self) -> float:
        return (self.left + self.right) / 2

    def edge(self, side: int) -> float:
        """The road's edge at the left (-1) or the right (1)."""
        return self.left if side < 0 else self.right

    def pavement(self, side: int) -> float:
        """How wide the pavement of a side is."""
        return self.left - self.left_wall if side < 0 else self.right_wall - self.right


class Canvas:
    """The picture, its labels and its depths while it is painted, far to near or not.

    Args:
        camera: how places become pixels.
        height: in pixels.
        width: in pixels.

    Attributes:
        image: float32 ``[H, W, 3]`` in 0..1, sky included.
        label: uint8 ``[H, W]``.
        depth: float32 ``[H, W]``, metres.
    """

    def __init__(self, camera: Camera, height: int, width: int) -> None:
        self._pillow = require("PIL.Image", "train", _PURPOSE)
        self._draw = require("PIL.ImageDraw", "train", _PURPOSE)
        self.camera, self.height, self.width = camera, height, width
        self.right, self.down = camera.rays(height, width)
        self.image = np.zeros((height, width, 3), dtype=np.float32)
        self.label = np.full((height, width), SKY, dtype=np.uint8)
        self.depth = np.full((height, width), _FAR, dtype=np.float32)

    def paint(self, mask: np.ndarray, colour: np.ndarray, label: int, depth: np.ndarray) -> None:
        """Paints some pixels, whatever was there.

        Args:
            mask: bool ``[H, W]``.
            colour: ``[pixels of the mask, 3]``, or one for all ``[3]``.
            label: their class.
            depth: ``[pixels of the mask]``, or one for all.
        """
        self.image[mask], self.label[mask], self.depth[mask] = colour, label, depth

    def outline(self, shapes: Sequence[Sequence[Point]], z: float) -> tuple[Window, np.ndarray]:
        """Pixels of polygons at a distance that nothing nearer hides.

        Args:
            shapes: points (column, row); two points are the corners of the box of an ellipse.
            z: distance in metres.

        Returns:
            The part of the picture around them, and which of its pixels are theirs, bool
            ``[h, w]``.
        """
        columns = [x for shape in shapes for x, _ in shape]
        rows = [y for shape in shapes for _, y in shape]
        left, right = _clipped(min(columns), max(columns), self.width)
        top, bottom = _clipped(min(rows), max(rows), self.height)
        window = slice(top, bottom), slice(left, right)
        if left == right or top == bottom:
            return window, np.zeros((bottom - top, right - left), dtype=bool)
        picture = self._pillow.new("L", (right - left, bottom - top), 0)
        draw = self._draw.Draw(picture)
        for shape in shapes:
            moved = [(x - left, y - top) for x, y in shape]
            if len(moved) == 2:
                (a, b), (c, d) = moved
                draw.ellipse([min(a, c), min(b, d), max(a, c), max(b, d)], fill=255)
            else:
                draw.polygon(moved, fill=255)
        return window, (np.asarray(picture) > 0) & (z <= self.depth[window] + 0.01)

    def paint_in(
        self, window: Window, mask: np.ndarray, colour: np.ndarray, label: int, depth: float
    ) -> None:
        """Paints some pixels of a part of the picture.

        Args:
            window: the part.
            mask: bool ``[h, w]``, of the part.
            colour: ``[pixels of the mask, 3]``.
            label: their class.
            depth: in metres.
        """
        self.image[window][mask] = colour
        self.label[window][mask], self.depth[window][mask] = label, depth


def _clipped(low: float, high: float, end: int) -> tuple[int, int]:
    begin = min(max(int(np.floor(low)), 0), end)
    return begin, min(max(int(np.ceil(high)) + 1, begin), end)


def grey(value: float) -> np.ndarray:
    """A colour without hue."""
    return np.full(3, value, dtype=np.float32)


def draw_sky(canvas: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Paints the sky, blue or overcast; returns the colour of the haze at the horizon."""
    clear = rng.random() < 0.4
    zenith = np.array([0.35, 0.52, 0.82] if clear else [0.72, 0.76, 0.8], dtype=np.float32)
    haze = np.array([0.88, 0.9, 0.93], dtype=np.float32) * rng.uniform(0.8, 1.1)
    up = np.clip(-canvas.down * rng.uniform(0.8, 1.6), 0, 1)[..., None]
    u = 60 * canvas.right / (0.3 - np.minimum(canvas.down, 0)) + rng.uniform(0, 256)
    v = 60 / (0.3 - np.minimum(canvas.down, 0)) + rng.uniform(0, 256)
    clouds = np.clip(0.4 + 0.3 * look_up(cloudy(1.7, 1), u, v), 0, 1)[..., None]
    canvas.image[:] = haze + (zenith - haze) * up
    canvas.image += clouds * (np.float32(0.97) - canvas.image) * rng.uniform(0, 0.9)
    return haze


def draw_ground(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Paints road, markings, kerbs, pavements, and grass behind some of them."""
    below = canvas.down > _EPSILON
    down = np.where(below, canvas.down, 1.0)
    z = np.where(below, canvas.camera.eye / down, _FAR)
    below &= z < 0.9 * _FAR
    z, x = z[below], (canvas.right * z)[below]
    # Far away a pixel covers many stones: their contrast fades.
    fade = 1 / (1 + z / 12)
    asphalt = cloudy(0.5, 2)
    tone = rng.uniform(0.25, 0.42) + 0.06 * fade * look_up(asphalt, 90 * x, 90 * z)
    tone += 0.03 * look_up(cloudy(1.0, 3), 12 * x, 3 * z)
    colour = tone[:, None] * np.array([1.0, 1.0, rng.uniform(1.0, 1.08)], dtype=np.float32)
    label = np.full(z.shape, ROAD, dtype=np.uint8)
    _mark(colour, x, z, street, rng)
    for side in (-1, 1):
        outside = side * (x - street.edge(side))
        paved, kerb = outside > 0, (outside > -0.12) & (outside < 0.15)
        stones = rng.uniform(0.4, 0.6) + 0.07 * fade * look_up(slabs(4), 60 * x, 60 * z)
        colour[paved] = stones[paved, None] * np.array([1.0, 0.97, 0.93], dtype=np.float32)
        colour[kerb] = rng.uniform(0.5, 0.68)
        label[paved] = PAVEMENT
        if rng.random() < 0.35:
            grass = outside > street.pavement(side) * rng.uniform(0.7, 1.0)
            blades = look_up(cloudy(0.5, 5), 80 * x, 80 * z)[grass, None] * fade[grass, None]
            green = np.array([0.3, 0.42, 0.18], dtype=np.float32) * rng.uniform(0.6, 1.2)
            colour[grass] = green * (1 + 0.25 * blades)
            label[grass] = TREE
    canvas.image[below], canvas.label[below], canvas.depth[below] = colour, label, z


def _mark(
    colour: np.ndarray, x: np.ndarray, z: np.ndarray, street: Street, rng: np.random.Generator
) -> None:
    """Paints lines on the road."""
    if rng.random() < 0.2:
        return
    dashes = (z + rng.uniform(0, 6)) % 6 < rng.uniform(2, 4)
    lines = (np.abs(x - street.middle) < 0.08) & dashes
    if rng.random() < 0.6:
        for side in (-1, 1):
            lines |= np.abs(x - street.edge(side) + side * 0.4) < 0.07
    colour[lines] = 0.3 * colour[lines] + 0.7 * np.array([0.8, 0.8, 0.74], dtype=np.float32)


def draw_walls(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Paints the houses, fences and gaps of both sides, and sometimes houses across the end."""
    for line in (street.left_wall, street.right_wall):
        slope = np.where(np.abs(canvas.right) < _EPSILON, _EPSILON, canvas.right)
        z = line / slope
        z = np.where(z > 0, z, _FAR)
        height = canvas.camera.eye - canvas.down * z
        begin, light = rng.uniform(-6, 2), rng.uniform(0.65, 1.0)
        while begin < 90:
            length = rng.uniform(5, 20)
            kind = rng.choice(3, p=[0.68, 0.17, 0.15])
            if kind < 2:
                top = rng.uniform(6, 16) if kind == 0 else rng.uniform(1.0, 2.2)
                mask = (z > begin) & (z < begin + length) & (height > 0) & (height < top)
                mask &= z < canvas.depth
                if mask.any():
                    u, v = z[mask] - begin, height[mask]
                    paint = _house if kind == 0 else _fence
                    colour, label = paint(u, v, top, rng), (BUILDING, FENCE)[kind]
                    canvas.paint(mask, colour * light, label, z[mask])
            begin += length
    if rng.random() < 0.5:
        z_end = rng.uniform(40, 95)
        x, height = canvas.right * z_end, canvas.camera.eye - canvas.down * z_end
        # Houses of their own height, nine metres wide each.
        profile = rng.uniform(6, 14) + 1.5 * look_up(cloudy(0.0, 6), x // 9, np.zeros_like(x))
        mask = (height > 0) & (height < profile) & (z_end < canvas.depth)
        if mask.any():
            colour = _house(x[mask] + 500, height[mask], 30.0, rng)
            canvas.paint(mask, colour * rng.uniform(0.6, 1), BUILDING, np.float32(z_end))


def _house(u: np.ndarray, v: np.ndarray, top: float, rng: np.random.Generator) -> np.ndarray:
    """Colours ``[pixels, 3]`` of a front at ``u`` metres along and ``v`` metres up."""
    base = (0.75 * rng.uniform(0.2, 0.8) + 0.25 * rng.uniform(0.2, 0.8, 3)).astype(np.float32)
    base *= np.array([1.06, 1.0, 0.9], dtype=np.float32)
    texture = bricks(7) if rng.random() < 0.6 else cloudy(1.0, 8)
    scale = rng.uniform(60, 160)
    tone = 1 + rng.uniform(0.03, 0.15) * look_up(texture, scale * u, scale * v)
    colour = base * tone[:, None].astype(np.float32)
    every, storey = rng.uniform(1.5, 3.2), rng.uniform(2.5, 3.4)
    across, up = u % every / every, v % storey / storey
    frame = (across > 0.24) & (across < 0.76) & (up > 0.28) & (up < 0.86)
    glass = (across > 0.29) & (across < 0.71) & (up > 0.33) & (up < 0.81)
    colour[frame] = colour[frame] * 0.3 + rng.uniform(0.3, 0.7)
    panes = look_up(cloudy(0.0, 9), u // every * 3, v // storey * 3)[glass]
    colour[glass] = np.clip(rng.uniform(0.1, 0.45) + 0.07 * panes, 0, 1)[:, None]
    if rng.random() < 0.45:
        shop = v < rng.uniform(2.4, 3.2)
        stuff = 0.1 * look_up(cloudy(1.0, 10), 40 * u, 40 * v)[shop, None]
        colour[shop] = rng.uniform(0.05, 0.6) * 0.6 + rng.uniform(0.05, 0.6, 3) * 0.4 + stuff
    colour[v > top - rng.uniform(0.2, 0.8)] *= rng.uniform(0.4, 0.8)
    return colour


def _fence(u: np.ndarray, v: np.ndarray, top: float, rng: np.random.Generator) -> np.ndarray:
    """Colours ``[pixels, 3]`` of a fence or a low wall."""
    base = (0.75 * rng.uniform(0.15, 0.6) + 0.25 * rng.uniform(0.1, 0.7, 3)).astype(np.float32)
    if rng.random() < 0.4:
        tone = 1 + 0.12 * look_up(bricks(11), 80 * u, 80 * v)
    else:
        pitch = rng.uniform(0.12, 0.3)
        tone = np.where(u % pitch < 0.55 * pitch, 1.15, rng.uniform(0.3, 0.8))
    tone = np.where(v > top - 0.12, 1.3, tone)
    return base * tone[:, None].astype(np.float32)


def finish(canvas: Canvas, haze: np.ndarray, rng: np.random.Generator) -> None:
    """Adds haze, light and the camera's curve."""
    share = 1 - np.exp(-np.minimum(canvas.depth, 300) / rng.uniform(80, 500))
    share[canvas.label == SKY] = 0
    canvas.image += share[..., None].astype(np.float32) * (haze - canvas.image)
    tint = np.array([1, rng.uniform(0.94, 1.02), rng.uniform(0.86, 1.1)], dtype=np.float32)
    bright = np.clip(canvas.image * (rng.uniform(0.62, 1.15) * tint), 0, 1)
    canvas.image[:] = bright ** np.float32(rng.uniform(0.8, 1.3))
