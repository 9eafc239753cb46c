"""What the documentation says, done: its code runs, its commands parse, its links lead somewhere.

Python blocks run in order, one namespace a file. Shell lines run too, but for those that install
or take minutes: `make` lines are resolved by `make -n`, `pyeff` lines are parsed by the command
that they name, `pip` lines are held against the project's metadata.
"""

import re
import shlex
import subprocess
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path

import pytest
import typer.main
from typer.testing import CliRunner

from pyeff.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN_WHOLE = {("pyeff", "info")}


@dataclass(frozen=True)
class Block:
    page: Path
    line: int  # of the first line of code, from 1
    language: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, language, start, code = [], None, 0, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        if not line.lstrip().startswith("```"):
            code.append(line)
        elif language is None:
            language, start, code = line.strip()[3:], number + 1, []
        else:
            found.append(Block(page, start, language, "\n".join(code) + "\n"))
            language = None
    assert language is None, f"{page}: a code block is not closed"
    return found


def shell_lines(block: Block) -> list[list[str]]:
    """The block's commands as words, comments and continuations resolved."""
    joined = block.code.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [
    pytest.param(block, words, id=f"{block.name}-{' '.join(words)[:40]}")
    for block in ALL
    if block.language == "bash"
    for words in shell_lines(block)
]
PYTHON_PAGES = sorted({block.page for block in ALL if block.language == "python"})


def check_make(words: list[str]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_pyeff(words: list[str]) -> None:
    command, arguments = typer.main.get_command(app), words[1:]
    if tuple(words[:2]) in RUN_WHOLE:
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        return
    while hasattr(command, "commands"):
        assert arguments, f"{words} names no command"
        assert arguments[0] in command.commands, f"pyeff has no command {arguments[0]}"
        command, arguments = command.commands[arguments[0]], arguments[1:]
    command.make_context(words[1], list(arguments))


def check_pip(words: list[str]) -> None:
    assert words[1] == "install"
    rest = list(words[2:])
    while rest:
        word = rest.pop(0)
        if word == "-C":  # a variable of the build
            name = rest.pop(0).removeprefix("cmake.define.").partition("=")[0]
            assert f"set({name} " in (ROOT / "CMakeLists.txt").read_text()
        elif word != "-e":
            match = re.fullmatch(r"(\.|pyeff)(?:\[([\w,]+)\])?", word)
            assert match, f"{word} is not this project"
            extras = set(match[2].split(",")) if match[2] else set()
            assert extras <= set(metadata("pyeff").get_all("Provides-Extra")), extras


def check_script(words: list[str]) -> None:
    for path in (word.partition("::")[0] for word in words[1:] if "/" in word):
        assert (ROOT / path).exists(), f"{path} is not there"


CHECKS = {
    "make": check_make,
    "pip": check_pip,
    "pyeff": check_pyeff,
    "pytest": check_script,
    "python": check_script,
}


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {block.name: block.language for block in ALL}
    strange = {name: kind for name, kind in kinds.items() if kind not in {"python", "bash", "text"}}
    assert strange == {}


@pytest.mark.parametrize("page", PYTHON_PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            # Blank lines ahead, so that a traceback names the line of the page.
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize(("block", "words"), SHELL)
def test_shell_lines_work(block, words):
    while "=" in words[0]:  # an environment variable for this one command
        words = words[1:]
    tool = words[0].removeprefix(".venv/bin/")
    if tool == "torchrun":  # its own options end where pyeff's begin
        words, tool = words[words.index("pyeff") :], "pyeff"
    assert tool in CHECKS, f"{block.name}: no way to check {words[0]}"
    CHECKS[tool](words)


RESULTS = ROOT / "docs" / "results"


def targets(page: Path) -> list[str]:
    """What a page links to, or shows, within the repository."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    found = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in found if not target.startswith(("https://", "mailto:"))]


LINKING = sorted({*PAGES, *(ROOT / "docs").rglob("*.md")})
LINKS = [
    pytest.param(page, target, id=f"{page.relative_to(ROOT)}-{target}")
    for page in LINKING
    for target in targets(page)
]


def anchors(page: Path) -> set[str]:
    """The fragments that a heading can be reached by, as repository hosts form them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_somewhere(page, target):
    path, _, fragment = target.partition("#")
    goal = (page.parent / path).resolve() if path else page
    assert goal.exists()
    assert goal.is_relative_to(ROOT)
    if fragment:
        assert fragment in anchors(goal)


def test_every_result_is_found_from_another_page():
    """Pages and pictures of results: a link leads to each, and the guide's index to every page."""
    leads = {
        page: {(page.parent / target.partition("#")[0]).resolve() for target in targets(page)}
        for page in LINKING
    }
    everything = {path for kind in ("md", "png", "jpg") for path in RESULTS.glob(f"*.{kind}")}
    linked = {goal for page, goals in leads.items() for goal in goals if goal != page}
    assert everything - linked == set()
    reached, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached:
            reached.add(page)
            waiting += [goal for goal in leads.get(page, ()) if goal.suffix == ".md"]
    assert {path for path in everything if path.suffix == ".md"} <= reached


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["make", "no-such-target"], AssertionError),
        (["pyeff", "no-such-command"], AssertionError),
        (["pip", "install", ".[no_such_extra]"], AssertionError),
        (["python", "benchmarks/no_such_file.py"], AssertionError),
    ],
)
def test_a_wrong_command_is_noticed(words, error):
    with pytest.raises(error):
        CHECKS[words[0]](words)


def test_a_wrong_option_is_noticed():
    with pytest.raises(Exception, match="no-such-option"):
        check_pyeff(["pyeff", "demo", "--no-such-option"])
