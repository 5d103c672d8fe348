"""One smoke build shared by the tests of the quickstart data."""

import pytest

from examples.quickstart import build


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    build.build(folder, "smoke", seed=0, processes=0)
    return folder
