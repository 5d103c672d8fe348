"""Request files: accepted lines, and messages for invalid ones."""

import io

import pytest

from mindvl_jax.core.errors import UserError
from mindvl_jax.inference.requests_file import read_requests

PIXELS = dict(min_pixels=None, max_pixels=None)


def _file(folder, *lines):
    path = folder / "requests.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_a_lines_own_settings_come_before_the_common_ones(tmp_path):
    path = _file(
        tmp_path,
        '{"prompt": "a", "images": ["x.png"], "id": 7, "n": 2, "temperature": 1, "stop": ".", "min_pixels": 3136}',
        "",
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "one\u2028line"}]}',
    )
    first, second = read_requests(
        path, dict(max_new_tokens=9, temperature=0.5, stop=("x",)), dict(min_pixels=784, max_pixels=6272)
    )
    assert (first.id, second.id) == ("7", "3")
    assert first.images == (str(tmp_path / "x.png"),) and first.messages[-1]["content"].endswith("a")
    assert (first.sampling.n, first.sampling.temperature, first.sampling.stop, first.sampling.max_new_tokens) == (
        2,
        1,
        (".",),
        9,
    )
    assert (second.sampling.n, second.sampling.temperature, second.sampling.stop) == (1, 0.5, ("x",))
    assert (first.min_pixels, second.min_pixels, first.max_pixels) == (3136, 784, 6272)
    assert second.messages[1] == {"role": "user", "content": "one\u2028line"}


def test_requests_may_come_by_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO('{"prompt": "a"}\n{"prompt": "b"}'))
    assert len(read_requests("-", {}, PIXELS)) == 2


@pytest.mark.parametrize("line, message", [
    ("{", "Invalid JSON"), ("[1]", "should be an object"), ('{"prompt": "x", "max_tokens": 3}',
    "unknown `max_tokens`; known are id, prompt, messages"),
    ('{"prompt": 5}', "`prompt`: Input should be a valid string"), ("{}", "either `prompt` or `messages`"),
    ('{"prompt": "x", "messages": [{"role": "user", "content": "y"}]}', "either `prompt` or `messages`"),
    ('{"prompt": "x", "images": "a.png"}', "`images`: Input should be a valid array"),
    ('{"messages": [{"role": "user"}]}', "`messages.0.content`: Field required"),
    ('{"messages": [{"role": "bot", "content": "x"}]}', "`messages.0.role`: Input should be 'system'"),
    ('{"messages": []}', "`messages`: List should have at least 1 item"),
    ('{"prompt": "x", "max_new_tokens": "5"}', "`max_new_tokens`: Input should be a valid integer"),
    ('{"prompt": "x", "n": 1.5}', "`n`: Input should be a valid integer"),
    ('{"prompt": "x", "top_p": 2}', "top_p is 2.0"), ('{"prompt": "x", "stop": [1]}', "`stop"),
    ('{"prompt": "x", "min_pixels": 0}', "`min_pixels`: Input should be greater than or equal to 1"),
    ('{"prompt": "<image><image>", "images": ["a.png"]}', "marks 2 images"),
])  # fmt: skip
def test_a_line_that_is_no_request_is_named_with_its_reason(tmp_path, line, message):
    with pytest.raises(UserError) as error:
        read_requests(_file(tmp_path, '{"prompt": "fine"}', line), {}, PIXELS)
    assert "1 line of" in str(error.value) and "line 2: " in str(error.value) and message in str(error.value)


def test_many_lines_are_gathered_and_the_first_ten_shown(tmp_path):
    with pytest.raises(UserError) as error:
        read_requests(_file(tmp_path, *["{}"] * 12), {}, PIXELS)
    assert "12 lines of" in str(error.value) and str(error.value).count("\n") == 11 and str(error.value).endswith("...")


@pytest.mark.parametrize(
    "content, message", [(None, "there is no file"), (b"\n\n", "holds no request"), (b"\xfd{}", "no text in UTF-8")]
)
def test_a_file_without_requests_is_refused(tmp_path, content, message):
    path = tmp_path / "r.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_requests(str(path), {}, PIXELS)
