"""Commands whose options stand in tables."""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer

# Name, type, default, help text.
Option = tuple[str, Any, Any, str]


def make_command(
    name: str,
    options: Sequence[Option],
    doc: str,
    action: Callable[[typer.Context, str, dict[str, Any]], None],
) -> Callable[..., None]:
    """A typer command with some options.

    Args:
        name: of the command.
        options: the tables, as one.
        doc: its help text.
        action: called with the context, the name and the options' values by their names.

    Returns:
        What ``typer.Typer.command`` takes.
    """

    def run(ctx: typer.Context, **values: Any) -> None:
        action(ctx, name, values)

    context = inspect.Parameter(
        "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    parameters = [context]
    for option, kind, default, text in options:
        flags = [f"--{option}/--no-{option}" if kind is bool and default else f"--{option}"]
        if option == "depth" and kind == int | None:
            flags.append("-d")  # the papers' letter, where depth is one number
        parameters.append(
            inspect.Parameter(
                option.replace("-", "_"),
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=Annotated[kind, typer.Option(*flags, help=text)],
            )
        )
    run.__name__, run.__doc__ = name, doc
    run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
    # typer reads the signature; writing each command's forty options out would hide what differs.
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


@contextmanager
def exits_of_training() -> Iterator[None]:
    """Around a training: what it raises ends the process, with one line instead of a traceback."""
    from pyeff.train import TrainingInterrupted

    try:
        yield
    except TrainingInterrupted as stopped:
        typer.echo(f"{stopped}; go on with --resume", err=True)
        # 128 + SIGINT, as shells have it.
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(1)


def is_given(ctx: typer.Context, name: str) -> bool:
    """Whether an option was given, rather than left at its default."""
    source = ctx.get_parameter_source(name)
    # By name: typer brings its own copy of click's enumeration from 0.29 on.
    return source is not None and source.name != "DEFAULT"


def size_of(text: str) -> tuple[int, int]:
    """Height and width of a text such as ``180x240``.

    Raises:
        ValueError: it is none.
    """
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"--size must be HEIGHTxWIDTH, such as 180x240, got {text!r}")
    return int(height), int(width)
