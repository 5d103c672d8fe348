"""Progress in a pipe: whole lines with the time of day, at least one every few seconds, and the same in a log file."""

import io
import re
import time

import pytest
from rich.table import Table
from rich.text import Text

from mindvl_jax.core.progress import LogConsole, counting, working
from mindvl_jax.training.display import LiveLine


@pytest.fixture
def console():
    return LogConsole(file=io.StringIO())


def lines(console):
    return console.file.getvalue().splitlines()


def test_lines_in_a_pipe_carry_the_time_and_are_never_wrapped(console):
    console.print("word " * 100)
    table = Table()
    table.add_column("c" * 100)
    table.add_row("d")
    console.print(table)
    told = lines(console)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in told)
    assert told[0].count("word") == 100 and any("c" * 100 in line for line in told)


def test_a_log_file_has_the_same_lines_with_the_date(console, tmp_path):
    console.print("before")
    console.log_to(tmp_path / "run.log")
    console.print(Text("after", style="bold"))
    console.close_log()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d after\n", (tmp_path / "run.log").read_text())


def test_a_terminal_draws_bars_and_the_log_gets_no_control_codes(tmp_path):
    console = LogConsole(file=io.StringIO(), force_terminal=True)
    console.log_to(tmp_path / "run.log")
    with counting(console) as show:
        show(1, 2, "scoring")
        console.print("[red]in between[/red]")
    console.close_log()
    log = (tmp_path / "run.log").read_text()
    assert "in between" in log and "\x1b" not in log and "scoring" in console.file.getvalue()


def test_work_that_takes_longer_says_so_and_counts_say_what_is_left(console):
    with working(console, "compiling", soon=0.02, every=0.02):
        time.sleep(0.1)
    assert (
        len([line for line in lines(console) if "compiling (0:00 so far)" in line]) >= 2
        and "compiling: done in" in lines(console)[-1]
    )
    with counting(console, soon=0.05, every=0.05) as show:
        show(0, 40, "digits [1]")
        show(20, 40, "digits [1]")
        time.sleep(0.2)
    assert re.search(r"digits \[1\]: 20 of 40, ETA 0:0\d \(", lines(console)[-1])


def test_quick_work_says_nothing(console):
    with working(console, "saving"):
        pass
    assert lines(console) == []


def test_the_time_left_takes_later_phases_by_the_work_of_their_steps():
    record = {"phase": "a", "loss": 1.0, "tokens": 1, "samples": 1, "token_efficiency": 1.0, "step_seconds": 2.0}
    line = LiveLine(LogConsole(file=io.StringIO()), 30, phases=[("a", 10, 1.0), ("b", 20, 3.0)])
    line.update(record | {"step": 1, "step_seconds": 600.0}, first_of_phase=True)
    assert line.text(record | {"step": 1}).endswith("ETA ?"), "the compiling step says nothing of the speed"
    line.update(record | {"step": 2}, first_of_phase=False)
    assert line.text(record | {"step": 2}).endswith("ETA 2:16")  # 8 steps of 2 s, 20 of 6 s
    line.new_phase()
    line.update(record | {"step": 12, "step_seconds": 5.0}, first_of_phase=False)
    assert line.text(record | {"step": 12}).endswith("ETA 1:30")


def test_a_long_run_says_once_how_long_it_takes_by_its_first_steps(console):
    record = {"phase": "a", "loss": 1.0, "tokens": 1, "samples": 1, "token_efficiency": 1.0, "step_seconds": 2.0}
    line = LiveLine(console, 300, phases=[("a", 100, 1.0), ("b", 200, 2.0)])
    for step in range(1, 30):
        line.update(record | {"step": step}, first_of_phase=step == 1)
    said = [each for each in lines(console) if "measured" in each]
    # After step 11: 89 steps of 2 s, then 200 of 4 s.
    assert len(said) == 1 and "2.00 s a step; 289 steps take about 16:18, this phase 2:58 of them" in said[0], said
    assert "tok/s" not in lines(console)[0], "the step that compiles has no speed"


def test_a_short_run_does_not(console):
    record = {"phase": "a", "loss": 1.0, "tokens": 1, "samples": 1, "token_efficiency": 1.0, "step_seconds": 0.1}
    line = LiveLine(console, 40, phases=[("a", 40, 1.0)])
    for step in range(1, 41):
        line.update(record | {"step": step}, first_of_phase=step == 1)
    assert not [each for each in lines(console) if "measured" in each]
