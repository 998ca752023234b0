import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

torch.set_num_threads(1)

MINUTES = ("test_docs.py", "test_sanitizers.py", "test_tutorial.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start first what takes minutes, so that no core waits for another at the end."""
    items.sort(key=lambda item: item.path.name not in MINUTES)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights of FID's network."""
    from inceptions import save_inception

    return save_inception(tmp_path_factory.mktemp("inception") / "weights.pth")
