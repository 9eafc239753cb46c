"""What stands and moves in a street scene: trees, poles, signs, cars, people, bicycles."""

from collections.abc import Callable, Sequence

import numpy as np

from pyeff.train.street_scene import (
    BICYCLIST,
    CAR,
    PEDESTRIAN,
    POLE,
    ROAD,
    SIGN,
    TREE,
    Canvas,
    Point,
    Street,
    grey,
)
from pyeff.train.street_textures import cloudy, look_up

_SIGN_COLOURS = np.array(
    [[0.72, 0.1, 0.1], [0.1, 0.25, 0.68], [0.8, 0.7, 0.12], [0.86, 0.86, 0.86], [0.1, 0.45, 0.2]],
    dtype=np.float32,
)
_SKIN = np.array([0.66, 0.5, 0.4], dtype=np.float32)


class Thing:
    """Something upright that faces the camera, at a place.

    Args:
        canvas: to paint on.
        x: metres to the right.
        z: metres ahead.
    """

    def __init__(self, canvas: Canvas, x: float, z: float) -> None:
        self.canvas, self.x, self.z = canvas, x, z

    def polygon(self, points: Sequence[Point]) -> list[Point]:
        """A shape in pixels, of points in metres to the right of and above the thing's foot."""
        return [self.canvas.camera.project(self.x + a, b, self.z) for a, b in points]

    def box(self, left: float, right: float, bottom: float, top: float) -> list[Point]:
        """A rectangle, in metres."""
        return self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)])

    def disc(self, a: float, b: float, radius: float, squeeze: float = 1.0) -> list[Point]:
        """An ellipse, in metres; ``squeeze`` narrows it."""
        return self.polygon(
            [(a - radius * squeeze, b + radius), (a + radius * squeeze, b - radius)]
        )

    def fill(
        self, shapes: Sequence[Sequence[Point]], colour: np.ndarray, label: int, rough: float = 0.0
    ) -> None:
        """Paints shapes.

        Args:
            shapes: in pixels.
            colour: ``[3]``.
            label: class.
            rough: standard deviation of the texture, as a share of the colour.
        """
        window, mask = self.canvas.outline(shapes, self.z)
        if not mask.any():
            return
        rows, columns = np.nonzero(mask)
        tone = np.ones((len(rows), 1), dtype=np.float32)
        if rough:
            metres = 40 * self.z / self.canvas.camera.focal
            places = columns * metres + 97 * abs(self.x), rows * metres + 31 * self.z
            tone += rough * look_up(cloudy(1.0, 12), *places)[:, None]
        self.canvas.paint_in(window, mask, np.clip(colour * tone, 0, 1), label, self.z)


def tree(thing: Thing, rng: np.random.Generator) -> None:
    """A trunk and a heap of leaves."""
    height = rng.uniform(4, 10)
    bark = np.array([0.28, 0.24, 0.2], dtype=np.float32) * rng.uniform(0.5, 1.3)
    trunk = thing.polygon([(-0.17, 0), (0.17, 0), (0.11, 0.6 * height), (-0.11, 0.6 * height)])
    thing.fill([trunk], bark, TREE, 0.2)
    leaves = np.array([0.2, 0.3, 0.12], dtype=np.float32) * rng.uniform(0.4, 1.5)
    leaves *= rng.uniform(0.8, 1.2, 3).astype(np.float32)
    crown = [
        thing.disc(
            rng.normal(0, 0.16 * height),
            rng.normal(0.68 * height, 0.12 * height),
            rng.uniform(0.06, 0.15) * height,
        )
        for _ in range(rng.integers(12, 26))
    ]
    thing.fill(crown, leaves, TREE, 0.4)


def pole(thing: Thing, rng: np.random.Generator) -> None:
    """A lamp post with its arm over the road."""
    height, arm = rng.uniform(4, 9), -np.sign(thing.x) * rng.uniform(0.6, 2.0)
    shapes = [thing.polygon([(-0.09, 0), (0.09, 0), (0.06, height), (-0.06, height)])]
    if rng.random() < 0.7:
        shapes.append(
            thing.polygon(
                [(0, height), (arm, height + 0.1), (arm, height - 0.1), (0, height - 0.1)]
            )
        )
    thing.fill(shapes, grey(rng.uniform(0.12, 0.55)), POLE, 0.1)


def sign(thing: Thing, rng: np.random.Generator) -> None:
    """A traffic sign, or traffic lights, on a post."""
    top, radius = rng.uniform(2.0, 3.0), rng.uniform(0.28, 0.5)
    thing.fill([thing.box(-0.05, 0.05, 0, top)], grey(rng.uniform(0.25, 0.5)), POLE)
    colour = rng.choice(_SIGN_COLOURS) * rng.uniform(0.7, 1.1)
    kind = rng.integers(4)
    if kind == 0:
        thing.fill([thing.box(-0.17, 0.17, top - 0.4, top + 0.5)], grey(0.08), SIGN)
        thing.fill([thing.disc(0, top + rng.choice([-0.2, 0.3]), 0.11)], colour, SIGN)
    elif kind == 1:
        thing.fill([thing.box(-radius, radius, top - radius, top + radius)], colour, SIGN)
        thing.fill([thing.box(-radius, radius, top - 0.1, top + 0.1)], grey(0.85), SIGN)
    else:
        thing.fill([thing.disc(0, top, radius)], colour, SIGN)
        thing.fill([thing.disc(0, top, 0.6 * radius)], grey(rng.uniform(0.6, 0.9)), SIGN)


def car(thing: Thing, rng: np.random.Generator) -> None:
    """A car, from behind, from the front, or from its side."""
    canvas = thing.canvas
    below, mask = canvas.outline([thing.polygon([(-1.1, 0.08), (1.1, -0.12)])], thing.z)
    canvas.image[below][mask & (canvas.label[below] == ROAD)] *= 0.5
    paint = 0.4 * rng.uniform(0.03, 0.9, 3) + 0.6 * rng.uniform(0.03, 0.9)
    paint, glass = paint.astype(np.float32), grey(rng.uniform(0.06, 0.35))
    top = rng.uniform(1.35, 1.75)
    if rng.random() < 0.2:
        _car_from_its_side(thing, paint, glass, top)
        return
    half = rng.uniform(0.82, 0.98)
    wheels = [thing.box(s * half - 0.12, s * half + 0.12, 0, 0.5) for s in (-0.86, 0.86)]
    thing.fill(wheels, grey(0.06), CAR)
    body = [(-half, 0.22), (half, 0.22), (half, 0.85), (0.78 * half, top)]
    body += [(-0.78 * half, top), (-half, 0.85)]
    thing.fill([thing.polygon(body)], paint, CAR, 0.05)
    window = [(-0.74 * half, 0.92), (0.74 * half, 0.92), (0.64 * half, top - 0.1)]
    thing.fill([thing.polygon([*window, (-0.64 * half, top - 0.1)])], glass, CAR, 0.15)
    lamp = np.array([0.75, 0.1, 0.08] if rng.random() < 0.6 else [0.95, 0.93, 0.8], np.float32)
    thing.fill(
        [thing.box(s * half - 0.13, s * half + 0.13, 0.62, 0.82) for s in (-0.82, 0.82)], lamp, CAR
    )
    thing.fill([thing.box(-0.26, 0.26, 0.4, 0.53)], np.array([0.85, 0.8, 0.4], np.float32), CAR)
    thing.fill([thing.box(-half, half, 0.2, 0.32)], 0.4 * paint, CAR)


def _car_from_its_side(thing: Thing, paint: np.ndarray, glass: np.ndarray, top: float) -> None:
    outline = [(-2.1, 0.3), (2.1, 0.3), (2.05, 0.8), (1.1, 0.92), (0.6, top)]
    outline += [(-1.0, top), (-1.7, 0.95), (-2.1, 0.85)]
    thing.fill([thing.polygon(outline)], paint, CAR, 0.05)
    thing.fill(
        [thing.polygon([(-1.5, 0.95), (0.9, 0.95), (0.5, top - 0.1), (-0.95, top - 0.1)])],
        glass,
        CAR,
        0.15,
    )
    thing.fill([thing.disc(a, 0.32, 0.32) for a in (-1.3, 1.3)], grey(0.06), CAR)


def pedestrian(thing: Thing, rng: np.random.Generator) -> None:
    """Somebody who walks or stands."""
    _person(thing, rng, PEDESTRIAN, 0.0)


def bicyclist(thing: Thing, rng: np.random.Generator) -> None:
    """Somebody on a bicycle, from behind or from the side."""
    wheels = (-0.5, 0.5) if rng.random() < 0.4 else (0.0,)
    squeeze = 1.0 if len(wheels) == 2 else 0.25
    thing.fill([thing.disc(a, 0.34, 0.34, squeeze) for a in wheels], grey(0.1), BICYCLIST)
    if len(wheels) == 2:
        frame = [(-0.5, 0.34), (-0.2, 0.85), (0.4, 0.9), (0.5, 0.34), (0.3, 0.78), (-0.1, 0.72)]
        thing.fill([thing.polygon(frame)], grey(rng.uniform(0.1, 0.6)), BICYCLIST)
    _person(thing, rng, BICYCLIST, rng.uniform(0.25, 0.4))


def _person(thing: Thing, rng: np.random.Generator, label: int, lifted: float) -> None:
    tall, stride = rng.uniform(1.5, 1.9), rng.uniform(0.0, 0.22)
    hip, shoulder = lifted + 0.48 * tall, lifted + 0.84 * tall
    cloth = [0.5 * rng.uniform(0.02, 0.75, 3) + 0.5 * rng.uniform(0.02, 0.5) for _ in range(2)]
    legs = [
        thing.polygon(
            [
                (s * 0.03, hip),
                (s * 0.2, hip),
                (s * (0.13 + stride), lifted),
                (s * (0.01 + stride), lifted),
            ]
        )
        for s in (-1, 1)
    ]
    thing.fill(legs, cloth[0].astype(np.float32), label, 0.1)
    trunk = [(-0.2, hip - 0.05), (0.2, hip - 0.05), (0.24, shoulder), (-0.24, shoulder)]
    thing.fill([thing.polygon(trunk)], cloth[1].astype(np.float32), label, 0.15)
    skin = _SKIN * np.float32(rng.uniform(0.4, 1.2))
    thing.fill([thing.disc(0, lifted + 0.93 * tall, 0.12, 0.8)], skin, label)


Painter = Callable[[Thing, np.random.Generator], None]


def draw_things(canvas: Canvas, street: Street, rng: np.random.Generator) -> None:
    """Paints everything that stands about, the farthest first."""
    things: list[tuple[float, float, Painter]] = []

    def beside(side: int, least: float, most: float) -> float:
        return street.edge(side) + side * rng.uniform(least, most)

    half = (street.right - street.left) / 2
    for _ in range(rng.integers(3, 11)):
        side = rng.choice([-1, 1])
        things.append((rng.uniform(7, 65), beside(side, 0.7, street.pavement(side) + 2.5), tree))
    for _ in range(rng.integers(3, 9)):
        upright: Painter = pole if rng.random() < 0.5 else sign
        things.append((rng.uniform(5, 50), beside(rng.choice([-1, 1]), 0.2, 0.9), upright))
    for _ in range(rng.integers(3, 12)):
        place = street.middle + rng.choice([-1, 1]) * rng.uniform(0.3, 0.9) * half
        things.append((rng.uniform(5, 45), place, car))
    for _ in range(rng.integers(0, 9)):
        side = rng.choice([-1, 1])
        place = beside(side, 0.2, max(0.5, street.pavement(side)))
        things.append((rng.uniform(5, 32), place, pedestrian))
    for _ in range(rng.integers(0, 3)):
        things.append(
            (rng.uniform(6, 32), rng.uniform(street.left + 0.5, street.right - 0.5), bicyclist)
        )
    for z, x, painter in sorted(things, key=lambda thing: -thing[0]):
        painter(Thing(canvas, x, z), rng)
