"""One server over the tiny model of tests/inference, on a free port of 127.0.0.1."""

import importlib.util
import io
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
import uvicorn

from mindvl_jax.inference import Generator
from mindvl_jax.inference.server.app import Server
from mindvl_jax.inference.server.metrics import Metrics
from mindvl_jax.inference.server.runner import Runner
from mindvl_jax.inference.server.settings import ServerSettings
from mindvl_jax.inference.server.sizes import prompt_sizes

_spec = importlib.util.spec_from_file_location(
    "inference_fixtures", Path(__file__).parents[1] / "inference" / "conftest.py"
)
_shared = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_shared)
tokenizer, opened, draw_pictures = _shared.tokenizer, _shared.opened, _shared.draw_pictures

CONTEXT, SLOTS = 256, 4


class Running:
    """A server in a thread of this process."""

    def __init__(self, opened, *, context=CONTEXT, sizes=None, adapters=None, prefix_bytes=0, **settings):
        generator = Generator(opened, slots=SLOTS, context=context, prefix_bytes=prefix_bytes)
        others = {name: Generator(each, slots=SLOTS, context=context) for name, each in (adapters or {}).items()}
        sizes = sizes or prompt_sizes(context=context, patches=256, images=4, rows=1)
        self.settings = ServerSettings(model="tiny", images=4, **settings)
        self.runner = Runner(
            generator, Metrics(), sizes, limit=self.settings.queue, chunk=self.settings.chunk, adapters=others
        )
        for _ in self.runner.warm_up():
            pass
        self.app = Server(self.runner, self.settings).app()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                port=self.port,
                log_level="warning",
                http="h11",
                timeout_keep_alive=30,
                h11_max_incomplete_event_size=64 << 10,
            )
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()

    def idle(self) -> bool:
        """Wait until nothing is under way; False after ten seconds."""
        for _ in range(1000):
            if not self.runner.load and not self.runner.busy:
                return True
            time.sleep(0.01)
        return False


@pytest.fixture(scope="session")
def start():
    return Running


@pytest.fixture(scope="session")
def running(opened):
    with Running(opened, body_bytes=1 << 20, image_bytes=1 << 19, queue=32, prefix_bytes=1 << 26) as server:
        yield server


@pytest.fixture(scope="session")
def http(running):
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def data_uri(draw_pictures):
    """data_uri(seed): a random PNG of 84 pixels."""
    import base64

    def make(seed: int = 0) -> str:
        file = io.BytesIO()
        draw_pictures(1, seed=seed, largest=56)[0].resize((84, 56)).save(file, "PNG")
        return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()

    return make
