"""The `pyeff` command: one module a command, each importing what it needs when it runs."""

import typer

from pyeff.cli._train_erfnet import train_erfnet
from pyeff.cli.demo import demo
from pyeff.cli.eval import evaluate
from pyeff.cli.export import export
from pyeff.cli.info import info
from pyeff.cli.predict import predict
from pyeff.cli.train import train
from pyeff.cli.tune import tune

app = typer.Typer(
    name="pyeff",
    help="Convolution networks that do less work per image and are really faster for it.",
    no_args_is_help=True,
    add_completion=False,
    # A traceback with every local variable would print whole tensors.
    pretty_exceptions_show_locals=False,
)


@app.callback()
def main() -> None:
    """Convolution networks that do less work per image and are really faster for it."""


app.command()(info)
app.command()(demo)
app.command("eval")(evaluate)
app.command()(export)
app.command()(tune)
train.command("erfnet")(train_erfnet)
app.add_typer(train)
app.add_typer(predict)
