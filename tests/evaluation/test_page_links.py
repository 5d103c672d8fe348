"""Links between the pages of a run: report, evaluation, tasks."""

import json
import re

import pytest

from mindvl_jax.cli.evaluate import refresh_report
from mindvl_jax.evaluation.browse import write_index
from mindvl_jax.evaluation.report import write_report

RESULT = {
    "title": "own",
    "metric": "anls",
    "score": 0.5,
    "ci95": [0.2, 0.8],
    "n": 8,
    "settings": {"min_pixels": 784, "max_pixels": 3136},
}


@pytest.fixture
def run(tmp_path):
    rows = [{"step": step, "phase": "a", "loss": 1.0 / step, "loss/x": 2.0} for step in range(1, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evaluation").mkdir()
    return tmp_path


def linked(page):
    """Files that a page links to."""
    found = re.findall(r'href="([^"#]+)"', page.read_text())
    return {(page.parent / target).resolve() for target in found}


def test_report_and_evaluation_link_to_each_other(run):
    write_report(run)
    index = write_index(run / "evaluation", {"own": RESULT})
    refresh_report(run)
    assert index.resolve() in linked(run / "report.html")
    assert linked(index) == {(run / "report.html").resolve()}
    assert f"Evaluation: {run.name}" in index.read_text()


def test_results_outside_of_a_run_link_to_no_report(tmp_path):
    (tmp_path / "out").mkdir()
    assert linked(write_index(tmp_path / "out", {"own": RESULT})) == set()
    refresh_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_of_a_search_links_back_to_all_tasks(run):
    page = write_index(run / "evaluation", {"own": RESULT}, name="search")
    assert (run / "evaluation" / "index.html").resolve() in linked(page)
