import pytest

from training_runs import run


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out
