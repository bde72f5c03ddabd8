"""The compile matrix: `compiling` on the import path, `--oldest-triton`, and what it compiled."""

import sys
from pathlib import Path

import pytest

# also in the processes that compile, which get this list
sys.path.insert(0, str(Path(__file__).parent))


def pytest_addoption(parser):
    """Known only when this folder is named on the command line."""
    parser.addoption(
        "--oldest-triton",
        action="store_true",
        help="the Triton on PYTHONPATH must be the oldest that the kernels support",
    )


def pytest_collection_modifyitems(config, items):
    """The oldest Triton compiles for fewer architectures: time."""
    if not config.getoption("oldest_triton", default=False):
        return
    from compiling import OLDEST_ARCHITECTURES

    def is_kept(item):
        launch = item.callspec.params.get("launch") if hasattr(item, "callspec") else None
        return launch is None or launch[1] in OLDEST_ARCHITECTURES

    config.hook.pytest_deselected(items=[item for item in items if not is_kept(item)])
    items[:] = filter(is_kept, items)


@pytest.fixture(scope="session")
def compiled(request):
    """Figures by `(case, architecture)`, of every one that a selected test asks for."""
    from compiling import compile_matrix

    wanted = [
        item.callspec.params["launch"]
        for item in request.session.items
        if "compiled" in item.fixturenames
    ]
    return compile_matrix(dict.fromkeys(wanted))
