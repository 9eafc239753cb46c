"""Pictures of a HydraNet's branches: how much each is used, and which classes it serves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyeff.train.picture import new_figure, write_picture


def plot_use(gate: Mapping[str, Any], path: Path, *, title: str | None = None) -> None:
    """Draws how often each branch runs, as a histogram beside even use.

    Args:
        gate: what :meth:`pyeff.train.gate_statistics.GateSummary.to_json` gave.
        path: the picture, by its suffix (.png, .svg, .pdf); written atomically.
        title: over the picture; by default the entropy of the use.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = new_figure(8, 3.4)
    axes = figure.subplots()
    use = [100 * share for share in gate["use"]]
    dead = set(gate["dead"])
    colors = ["C3" if branch in dead else "C0" for branch in range(len(use))]
    axes.bar(range(len(use)), use, color=colors)
    axes.axhline(100 / len(use), color="0.4", linewidth=1, linestyle="--")
    axes.set_xlabel("branch")
    axes.set_ylabel("share of (image, branch) pairs, %")
    axes.set_xticks(range(len(use)))
    axes.set_title(title or f"entropy of use: {gate['entropy']:.3f} of log n_b (dashed: even use)")
    write_picture(figure, path)


def plot_branches(
    gate: Mapping[str, Any],
    class_names: Sequence[str],
    path: Path,
    *,
    class_groups: Sequence[int] | None = None,
    title: str | None = None,
) -> None:
    """Draws which classes each branch serves: the share of a class's images that run a branch.

    Classes are ordered by the branch that owns them (framed), or, where none does, by the branch
    that serves most of their images.

    Args:
        gate: what :meth:`pyeff.train.gate_statistics.GateSummary.to_json` gave, with ``serves``.
        class_names: one a class.
        path: the picture, by its suffix; written atomically.
        class_groups: the branch that owns each class.
        title: over the picture.

    Raises:
        ImportError: matplotlib is missing.
    """
    serves = gate["serves"]
    n_b = len(serves[0])
    best = [max(range(n_b), key=row.__getitem__) for row in serves]
    owners = best if class_groups is None else class_groups
    order = sorted(range(len(serves)), key=lambda c: (owners[c], -serves[c][owners[c]], c))
    # Classes lie along the longer side; a name needs about a seventh of an inch.
    figure = new_figure(2.2 + 0.26 * n_b, max(3.2, 1.4 + 0.135 * len(order)))
    axes = figure.subplots()
    shares = [[100 * share for share in serves[c]] for c in order]
    image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=100)
    if class_groups is not None:
        from matplotlib.patches import Rectangle

        for row, c in enumerate(order):
            corner = (owners[c] - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="C1", linewidth=1))
    axes.set_xticks(range(n_b), [str(b) for b in range(n_b)], fontsize=7)
    axes.set_yticks(range(len(order)), [class_names[c] for c in order], fontsize=7)
    axes.tick_params(length=0)
    axes.set_xlabel("branch (framed: it owns the class)" if class_groups is not None else "branch")
    bar = figure.colorbar(
        image, ax=axes, shrink=min(1.0, 4 / figure.get_figheight()), anchor=(0, 1)
    )
    bar.set_label("images of the class\nthat run the branch, %")
    if title:
        figure.suptitle(title)
    write_picture(figure, path)
