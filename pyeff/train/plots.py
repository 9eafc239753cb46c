"""Plots of accuracy against what a level costs."""

from collections.abc import Sequence
from pathlib import Path

from pyeff.train.evaluate import LevelResult
from pyeff.train.picture import new_figure, write_picture

_AXES = (("params", "parameters"), ("macs", "multiply-adds an image"))


def plot_levels(
    results: Sequence[LevelResult],
    path: Path,
    *,
    dense: Sequence[LevelResult] = (),
    title: str | None = None,
) -> None:
    """Draws accuracy against parameters and against MACs: a line a task, a point a level.

    Args:
        results: the table of a nested network; lines without accuracy are left out.
        path: the picture, by its suffix (.png, .svg, .pdf); written atomically.
        dense: tables of networks trained alone, drawn as stars in their task's colour.
        title: over the picture.

    Raises:
        ValueError: no line has an accuracy.
        ImportError: matplotlib is missing.
    """
    shown = [r for r in results if r.accuracy is not None]
    if not shown:
        raise ValueError("plot_levels: results must hold accuracies, got none")
    figure = new_figure(10, 4.2)
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    for axes, (field, label) in zip(figure.subplots(1, 2, sharey=True), _AXES, strict=True):
        for index, task in enumerate(dict.fromkeys(r.task for r in shown)):
            color = f"C{index}"
            points = [
                (getattr(r, field), 100 * (r.accuracy or 0), r.level)
                for r in shown
                if r.task == task
            ]
            axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=color, label=task)
            for x, y, level in points:
                # Tasks take sides in turn, so that the numbers of two equal points stay apart.
                side = -11 if index % 2 else 5
                axes.annotate(str(level), (x, y), textcoords="offset points", xytext=(side, -11))
            alone = [r for r in dense if r.task == task and r.accuracy is not None]
            axes.plot(
                [getattr(r, field) for r in alone],
                [100 * (r.accuracy or 0) for r in alone],
                "*",
                color=color,
                markersize=13,
                label=f"{task}, trained alone" if alone else None,
            )
        axes.set_xlabel(label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        # Room for the level numbers below the lowest points.
        axes.margins(x=0.08, y=0.1)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("test accuracy, %")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    if title:
        figure.suptitle(title)
    write_picture(figure, path)
