import pytest


@pytest.fixture(autouse=True)
def every_program_is_written_anew(monkeypatch):
    monkeypatch.setenv("NPU_BRIDGE_CACHE", "off")


@pytest.fixture(scope="session")
def pool():
    """Four gloo processes, started once for all tests."""
    from tests.bridge.harness import Pool

    started = Pool()
    yield started
    started.close()
