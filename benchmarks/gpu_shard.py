"""A pytest plugin: ``-p gpu_shard --part 2/8`` runs every eighth test, from the third on.

The GPU tests spend their time in compilers, so several processes finish them sooner, and the
machine of `make gpu` may have no plugin for that.
"""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option --part."""
    parser.addoption("--part", default="0/1", help="which part of the tests, of how many")


@pytest.hookimpl(trylast=True)  # what -m takes away is gone by then
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps the tests of this part."""
    part, parts = (int(number) for number in config.getoption("--part").split("/"))
    config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % parts != part])
    items[:] = items[part::parts]
