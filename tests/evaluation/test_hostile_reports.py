"""Pages made of other people's text: whatever names, questions and answers hold, no script, event or link of theirs is
in the page, and damaged files of a run never end the report.
"""

from __future__ import annotations

import html.parser
import json

import pytest
from PIL import Image

from mindvl_jax.core.errors import UserError
from mindvl_jax.evaluation.benchmarks import Benchmark
from mindvl_jax.evaluation.browse import write_index, write_task_page
from mindvl_jax.evaluation.items import Item
from mindvl_jax.evaluation.metrics import rule_of
from mindvl_jax.evaluation.report import write_report

PAYLOADS = {
    "script": "<script>alert(1)</script>",
    "end of a script": "</script><script>alert(1)</script>",
    "event": '"><img src=x onerror=alert(1)>',
    "event in single quotes": "'><svg onload=alert(1)>",
    "attribute": '" onmouseover="alert(1)" x="',
    "frame": "<iframe src=javascript:alert(1)></iframe>",
    "link": '<a href="javascript:alert(1)">x</a>',
    "base": '<base href="http://evil/">',
    "style": "</style><style>*{background:url(http://evil)}",
    "comment": "--><script>alert(1)</script><!--",
    "cdata": "]]><script>alert(1)</script>",
    "template": "{{ 7 * 7 }}{% for x in ().__class__.__base__.__subclasses__() %}{% endfor %}",
    "entity": "&lt;script&gt;alert(1)&lt;/script&gt;",
    "null": "a\0b\x1b[2J\x07",
    "separators": "\u2028\u2029\u202e\ufeff",
    "title": "</title><script>alert(1)</script>",
    "textarea": "</textarea></pre></code><script>alert(1)</script>",
    "meta": '<meta http-equiv="refresh" content="0;url=http://evil">',
    "unicode": "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16") + "<ſcript>",
    "long": "<" * 100_000,
}


class Seen(html.parser.HTMLParser):
    """Tags and attributes that a browser would act on."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: dict[str, int] = {}
        self.events: list[tuple[str, str]] = []
        self.targets: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        for name, value in attributes:
            if name.startswith("on"):
                self.events.append((tag, name))
            if name in ("src", "href", "action", "data", "content"):
                self.targets.append(value or "")

    @property
    def dangerous(self):
        return {tag: self.tags.get(tag, 0) for tag in ("script", "iframe", "base", "meta", "object", "svg", "style")}


def run_folder(folder, text: str):
    (folder / "predictions" / "p").mkdir(parents=True)
    task = {"metric": text, "score": 0.5, "ci95": [0, 1], "n": 1, "step": 1, "language_only": None}
    scores = {"phase": "p", "step": 1, "tasks": {"t": {**task, "by_phase": {"p": task}}}}
    row = {
        "id": text,
        "question": text,
        "answers": [text],
        "prediction": text,
        "score": 0.0,
        "error": text,
        "shown": [],
    }
    metrics = {"step": 1, "phase": text, "loss": 1.0, "loss/" + text: 1.0, "tokens_total": 1, "samples_total": 1}
    metrics |= {"seconds_total": 1.0, "learning_rate": 1e-3, "grad_norm": 1.0, "sample_ids": [text]}
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "predictions" / "p" / "t.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "metrics.jsonl").write_text(json.dumps(metrics) + "\n" + json.dumps({**metrics, "step": 2}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({"run": {"dir": text}, "data": {"sources": {text: {"path": text}}}}))
    return folder


def task_page(folder, text: str):
    main, rule = rule_of("exact_match")
    benchmark = Benchmark("t", main, (), (), read=None, rule=rule, max_new_tokens=1)
    item = Item(id=text, messages=({"role": "user", "content": text},), answers=(text,), category=text)
    result = {
        "title": text,
        "metric": "exact_match",
        "score": 0.0,
        "ci95": [0, 1],
        "n": 1,
        "errors": 0,
        "settings": {"x": text},
        "weights": text,
        "language_only": None,
        "by_category": {text: {"score": 0.0, "n": 1}},
        "task": text,
        "prompts": text,
        "seconds": 1.0,
        "source": text,
        "tokens": 1,
        "commit": text,
        "min_pixels": 1,
        "max_pixels": 2,
        "max_new_tokens": 1,
    }
    folder.mkdir(exist_ok=True)
    pages = [write_task_page(folder, "t", benchmark, [item], [{"prediction": text, "error": text}], None, result)]
    return [*pages, write_index(folder, {"t": result}, notes=[text])]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    report = write_report(run_folder(folder / "run", "plain"))
    return [Seen(path.read_text()) for path in (report, *task_page(folder / "out", "plain"))]


@pytest.mark.parametrize("name", PAYLOADS)
def test_text_stays_text_in_every_page(tmp_path, plain, name):
    text = PAYLOADS[name]
    pages = [write_report(run_folder(tmp_path / "run", text)), *task_page(tmp_path / "out", text)]
    for path, usual in zip(pages, plain, strict=True):
        content = path.read_text(encoding="utf-8")
        seen = Seen(content)
        assert seen.dangerous == usual.dangerous and seen.events == usual.events, path.name
        assert not any("javascript:" in target or "evil" in target for target in seen.targets)
        assert "49" not in seen.tags and "alert(1)</script>" not in content and "\0" not in content


DAMAGED = {
    "scores.json": [
        b"",
        b"{",
        b"[]",
        b'{"tasks": []}',
        b'{"tasks": {"t": 5}}',
        b'{"tasks": {"t": {}}, "phase": "p"}',
        b"[" * 50_000,
        b"\xff\xfe",
    ],
    "metrics.jsonl": [
        b"",
        b"{\n",
        b'{"step": "x"}\n',
        b'{"step": 1}\n',
        b'{"step": 1, "loss": "<b>"}\n',
        b'{"step": 1, "loss": [], "phase": 5}\n',
        b'{"step": 1, "loss": NaN, "phase": "p"}\n',
        b'{"step": 1e400}\n',
        b"\xff\n",
    ],
    "config.yaml": [b"", b"[", b"\xff\xfe\x00", b"a: &a [*a]"],
    "predictions/p/t.jsonl": [
        b"",
        b"{",
        b"[]\n",
        b'{"shown": 5}\n',
        b'{"shown": [5], "score": 1}\n',
        b'{"shown": ["t.jsonl"], "score": 0}\n',
        b'{"shown": ["../../../../../../etc/passwd"], "score": "x"}\n',
        b'{"shown": ["/dev/zero"]}\n',
    ],
}


@pytest.mark.parametrize(
    ("file", "content"), [(file, content) for file, all_of in DAMAGED.items() for content in all_of]
)
def test_a_damaged_file_of_a_run_never_ends_its_report(tmp_path, file, content):
    folder = run_folder(tmp_path / "run", "plain")
    (folder / file).write_bytes(content)
    if file == "scores.json":
        with pytest.raises(UserError, match=r"scores.json is"):
            write_report(folder)
        return
    page = write_report(folder).read_text()
    assert "<html" in page and "root:" not in page


def test_only_images_of_the_evaluation_are_shown(tmp_path):
    folder = run_folder(tmp_path / "run", "plain")
    Image.new("RGB", (8, 8)).save(tmp_path / "elsewhere.png")
    row = {"id": "1", "question": "q", "answers": ["a"], "prediction": "b", "score": 0.0}
    shown = ["../../../elsewhere.png", str(tmp_path / "elsewhere.png")]
    (folder / "predictions" / "p" / "t.jsonl").write_text(json.dumps({**row, "shown": shown}) + "\n")
    before = write_report(folder).read_text().count("<img")
    (folder / "predictions" / "p" / "t.jsonl").write_text(json.dumps({**row, "shown": []}) + "\n")
    assert write_report(folder).read_text().count("<img") == before
