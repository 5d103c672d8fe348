"""The emulator's cache: libraries of a folder that others may write are not loaded."""

import os
from types import SimpleNamespace

import pytest

from npu_bridge.emulator import build
from npu_bridge.emulator.errors import EmulatorError


def complete(folder):
    (folder / "lib").mkdir(parents=True)
    (folder / "complete").touch()
    return folder


@pytest.fixture
def toolchain(monkeypatch):
    monkeypatch.setattr(build, "key_of", lambda toolchain: "key")
    return SimpleNamespace(versions={})


def test_a_cache_of_ones_own_is_used_and_made_for_oneself_alone(tmp_path, toolchain):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    complete(cache / "key")
    assert build.build(toolchain, cache=cache) == cache / "key" / "lib"
    with pytest.raises(AttributeError):  # nothing to build with: the folder comes first
        build.build(toolchain, cache=tmp_path / "new", quiet=True)
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("place", [".", "key", "key/lib"])
@pytest.mark.parametrize("fault", ["writable", "foreign"])
def test_a_folder_that_others_may_write_is_refused(tmp_path, toolchain, monkeypatch, place, fault):
    cache = tmp_path / "cache"
    complete(cache / "key")
    for folder in (cache, cache / "key", cache / "key" / "lib"):
        folder.chmod(0o700)
    if fault == "writable":
        (cache / place).chmod(0o777)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(EmulatorError, match="is not used as the emulator's cache"):
        build.build(toolchain, cache=cache)
