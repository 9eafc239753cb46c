import json
import subprocess
import sys

import pytest
import typer.main
from typer.testing import CliRunner

import pyeff
from pyeff.cli.main import app

OPTIONAL = ["matplotlib", "sklearn", "torchmetrics", "safetensors", "PIL"]


def leaves(command, path=()):
    """(path, command) of every command that can be run."""
    inner = getattr(command, "commands", None)
    if inner is None:
        return [(path, command)]
    return [leaf for name, sub in inner.items() for leaf in leaves(sub, (*path, name))]


COMMANDS = leaves(typer.main.get_command(app))


def test_json_is_what_python_says():
    result = CliRunner().invoke(app, ["info", "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == pyeff.info()


def test_table_names_every_fact():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    names = {line.strip() for line in result.stdout.splitlines()}
    for key in pyeff.info():
        assert any(name.startswith(key.replace("_", " ")) for name in names), key
    assert pyeff.info()["version"] in result.stdout


def test_the_command_imports_no_extra():
    code = (
        "import sys; from pyeff.cli.main import app\n"
        "try: app(['info', '--json'])\n"
        f"except SystemExit: pass\nprint([m for m in {OPTIONAL} if m in sys.modules], end='')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("}\n[]")


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=["-".join(p) for p, _ in COMMANDS])
def test_help_has_an_example(path, command):
    result = CliRunner().invoke(app, [*path, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert f"pyeff {' '.join(path)}" in result.stdout.partition("Example")[2]


def test_without_a_command_it_lists_them():
    result = CliRunner().invoke(app, [])
    for path, _ in COMMANDS:
        assert path[0] in result.output
