"""Runs that a benchmark trained before: whether they are of the recipe that is asked for now."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyeff.checkpoint import config_differences


def results_of(folder: Path) -> dict[str, Any] | None:
    """What a finished run left; ``None`` for one that is not finished, or not begun."""
    path = folder / "results.json"
    if not path.exists():
        return None
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def check_recipe(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuses a finished run of another recipe, whose numbers would pass for this one's.

    Args:
        folder: of the run.
        found: its settings that decide the result.
        wanted: those of this recipe.

    Raises:
        SystemExit: lists what differs.
    """
    differences = config_differences(found, wanted)
    if differences:
        raise SystemExit(
            f"{folder} must be a run of this recipe, got one of another; train to another --runs, "
            "or give the recipe's options: " + "; ".join(differences)
        )
