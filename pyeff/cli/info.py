"""`pyeff info`: what this installation is and what it runs on."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer


def info(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Print the version, the instruction set in use, threads, CUDA, Triton and torch.

    Example: pyeff info --json
    """
    import pyeff

    facts = pyeff.info()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _print_table(facts)


def _print_table(facts: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _rows(facts):
        table.add_row(Text(name, style="bold"), Text(value))
    Console().print(table)


def _rows(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The facts as (name, text), nested ones as "outer inner"."""
    for key, value in facts.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping) and value:
            yield from _rows(value, prefix=f"{name} ")
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return " ".join(f"{key.replace('_', ' ')} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) if value else "none"
    return str(value)
