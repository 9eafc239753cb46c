"""Pictures of a network that learned its own size: its neurons, its ranks, what they buy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyeff.train.picture import new_figure, write_picture

_INCHES_A_LAYER = 0.32


@dataclass(frozen=True)
class SizePoint:
    """One network in :func:`plot_accuracy_against_parameters`.

    Attributes:
        params: number of parameters.
        accuracy: share of right answers, 0..1; the mean where there are several runs.
        spread: standard deviation of the accuracy, 0..1; ``None`` of a single run.
    """

    params: int
    accuracy: float
    spread: float | None = None


def plot_neurons(
    before: Mapping[str, int], after: Mapping[str, int], path: Path, *, title: str | None = None
) -> None:
    """Draws the neurons of each layer before and after, as bars side by side.

    Args:
        before: layer to number of neurons at the start, in the order to draw them.
        after: the same layers at the end.
        path: the picture, by its suffix; written atomically.
        title: over the picture; by default the share that was removed.

    Raises:
        ValueError: no layer, or other layers after than before.
        ImportError: matplotlib is missing.

    Source: after the bar charts of Alvarez, Salzmann, "Learning the Number of Neurons in Deep
    Networks", NIPS 2016.
    """
    if not before or set(before) != set(after):
        odd = sorted(set(before) ^ set(after))
        raise ValueError(
            f"plot_neurons: before and after must hold the same layers, one at least, got "
            f"{len(before)} and {len(after)}" + (f", differing in {odd}" if odd else "")
        )
    names = list(before)
    figure = new_figure(2.0 + _INCHES_A_LAYER * max(len(names), 8), 3.8)
    axes = figure.subplots()
    places = range(len(names))
    axes.bar([p - 0.2 for p in places], [before[n] for n in names], 0.4, label="before", color="C7")
    axes.bar([p + 0.2 for p in places], [after[n] for n in names], 0.4, label="after", color="C0")
    axes.set_xticks(places, names, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_ylabel("neurons")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    total, left = sum(before.values()), sum(after.values())
    axes.set_title(
        title or f"{total - left:,} of {total:,} neurons removed ({1 - left / total:.0%})"
    )
    write_picture(figure, path)


def plot_per_epoch(
    counts: Mapping[int, Mapping[str, int]], path: Path, *, label: str = "rank"
) -> None:
    """Draws how a number of each layer (its rank, its live neurons) goes with the epochs.

    Args:
        counts: epoch to layer to the number; a layer may be missing in some epochs.
        path: the picture, by its suffix; written atomically.
        label: what the number is.

    Raises:
        ValueError: no epoch.
        ImportError: matplotlib is missing.
    """
    if not counts:
        raise ValueError("plot_per_epoch: counts must hold an epoch, got none")
    epochs = sorted(counts)
    names = list(dict.fromkeys(name for epoch in epochs for name in counts[epoch]))
    figure = new_figure(8, 4.2)
    axes = figure.subplots()
    from matplotlib import colormaps

    shades = colormaps["viridis"]
    for index, name in enumerate(names):
        known = [e for e in epochs if name in counts[e]]
        color = shades(index / max(len(names) - 1, 1) * 0.92)
        values = [counts[e][name] for e in known]
        axes.plot(known, values, ".-", color=color, linewidth=1, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    columns = 1 if len(names) <= 20 else 2
    figure.legend(loc="outside right center", fontsize=6, ncols=columns, frameon=False)
    write_picture(figure, path)


def plot_accuracy_against_parameters(
    lines: Mapping[str, Sequence[SizePoint]], path: Path, *, title: str | None = None
) -> None:
    """Draws accuracy against parameters: a line a way of making networks, a point a network.

    Args:
        lines: the way's name to its networks.
        path: the picture, by its suffix; written atomically.
        title: over the picture.

    Raises:
        ValueError: no network at all.
        ImportError: matplotlib is missing.
    """
    if not any(lines.values()):
        raise ValueError("plot_accuracy_against_parameters: lines must hold a point, got none")
    figure = new_figure(7, 4.4)
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes = figure.subplots()
    for name, points in lines.items():
        ordered = sorted(points, key=lambda point: point.params)
        bars = [100 * (point.spread or 0.0) for point in ordered]
        axes.errorbar(
            [point.params for point in ordered],
            [100 * point.accuracy for point in ordered],
            yerr=bars if any(bars) else None,
            fmt="o-" if len(ordered) > 1 else "*",
            markersize=5 if len(ordered) > 1 else 11,
            capsize=3,
            label=name,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("parameters")
    axes.set_ylabel("test accuracy, %")
    axes.margins(x=0.08, y=0.1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    if title:
        axes.set_title(title)
    write_picture(figure, path)
