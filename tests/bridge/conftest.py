import os

import pytest

os.environ.setdefault("NPU_BRIDGE_CACHE", "off")


@pytest.fixture(scope="session")
def pool():
    """Four gloo processes, started once for all tests."""
    from tests.bridge.harness import Pool

    started = Pool()
    yield started
    started.close()
