"""Data behind URLs: read by ranges or from a copy, the same samples as from local files."""

import http.server
import io
import json
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mindvl_jax.config.schema import SourceConfig
from mindvl_jax.core.errors import UserError
from mindvl_jax.data import remote
from mindvl_jax.data.media.files import read_bytes
from mindvl_jax.data.sample import Media, SampleError
from mindvl_jax.data.sources import archives
from mindvl_jax.data.sources.readers import Source

ROWS = [{"id": str(number), "question": f"{number}?", "answer": str(number)} for number in range(20)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remote._info.cache_clear()
    return tmp_path / "cache" / "mindvl_jax" / "data"


@pytest.fixture
def bucket():
    """A file system in memory, emptied afterwards."""
    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS).encode())
    image = io.BytesIO()
    Image.new("RGB", (28, 28), (9, 8, 7)).save(image, "PNG")
    memory.pipe("/bucket/images/one.png", image.getvalue())
    memory.pipe("/bucket/notes.txt", b"no data")
    memory.pipe("/bucket/test/b.jsonl", b'{"question": "another split?", "answer": "yes"}')
    yield memory
    memory.rm("/bucket", recursive=True)


def test_a_url_gives_the_samples_of_the_same_local_file(bucket, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(bucket.cat("/bucket/a.jsonl"))
    local = Source("s", SourceConfig(path=str(tmp_path / "a.jsonl")))
    for path in ("memory://bucket/a.jsonl", "memory://bucket/*.jsonl", "memory://bucket"):
        found = Source("s", SourceConfig(path=path))
        assert len(found) == 20
        assert [found[index].messages for index in range(20)] == [local[index].messages for index in range(20)]
        assert found.where(3).startswith("memory://") and found.where(3).endswith("a.jsonl line 4")


def test_parquet_is_read_a_row_group_at_a_time_without_a_copy(tmp_path, monkeypatch, cache):
    rows = [row | {"id": f"{number:0256x}"} for number, row in enumerate(ROWS * 100)]
    pq.write_table(
        pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=200, compression=None, use_dictionary=False
    )
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        content = (tmp_path / "a.parquet").read_bytes()

        def do_HEAD(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", '"v1"')
            self.end_headers()

        def do_GET(self):
            if "Range" not in self.headers:  # fsspec asks whether it is there and reads nothing
                self.do_HEAD()
                return
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = self.content[int(start) : int(end or len(self.content) - 1) + 1]
            asked.append(len(part))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(self.content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            self.wfile.write(part)

        def log_message(self, *arguments):
            pass

    fsspec.config.conf["http"] = {"block_size": 1 << 14}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        source = Source("s", SourceConfig(path=f"http://127.0.0.1:{server.server_address[1]}/a.parquet"))
        assert len(source) == 2_000 and source[1_999].messages[0].content == "19?"
        assert sum(asked) < len(Handler.content) / 2, "only the footer and one row group of ten"
        assert not cache.exists()
        assert '"v1"' in remote.version(source.paths[0])
    finally:
        server.shutdown()
        fsspec.config.conf.pop("http")


def test_media_beside_a_remote_file_are_fetched_once_and_stay_inside_its_folder(bucket, cache):
    first = read_bytes(Media(path="images/one.png", root="memory://bucket"))
    assert first == bucket.cat("/bucket/images/one.png") and len(list(cache.iterdir())) == 1
    assert read_bytes(Media(path="images/one.png", root="memory://bucket")) == first
    for path in ("../secret.png", "/etc/passwd", "a/../../b.png", "images//one.png"):
        with pytest.raises(SampleError) as refused:
            read_bytes(Media(path=path, root="memory://bucket"))
        assert refused.value.reason == "outside_root"
    with pytest.raises(SampleError) as refused:
        read_bytes(Media(path="images/two.png", root="memory://bucket"))
    assert refused.value.reason == "missing_media"


def test_a_changed_file_is_fetched_again_and_is_another_content(bucket):
    source = Source("s", SourceConfig(path="memory://bucket/a.jsonl"))
    digest = source.digest
    bucket.pipe("/bucket/a.jsonl", (json.dumps(ROWS[0]) + "\n").encode())
    remote._info.cache_clear()
    changed = Source("s", SourceConfig(path="memory://bucket/a.jsonl"))
    assert len(changed) == 1 and changed.digest != digest


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("memory://bucket/none.jsonl", "nothing to read at"),
        ("nosuch://bucket/a.jsonl", "nosuch://bucket/a.jsonl: Protocol not known"),
        ("http://127.0.0.1:9/a.jsonl", "nothing to read at|cannot be read"),
    ],
)
def test_what_cannot_be_reached_is_refused_by_name(bucket, path, message):
    with pytest.raises(UserError, match=message):
        Source("s", SourceConfig(path=path))


def test_a_remote_parquet_file_survives_a_worker_process(bucket):
    import pickle

    memory = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), memory)
    bucket.pipe("/bucket/p/a.parquet", memory.getvalue())
    records = pickle.loads(pickle.dumps(archives.ParquetRecords("memory://bucket/p/a.parquet")))
    assert records.read(7)["question"] == "7?"
