"""``examples/live_migration/run.py`` as a user starts it: a program that starts its own clusters, and what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).parents[2] / "examples" / "live_migration" / "run.py"
LONG, SHORT = "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"
#: Of the long answer, which takes some seconds then; and in which the program is done on any machine.
N_TOKENS, LIMIT_S = 120, 100.0


def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # What other tests have set in this process is none of the user's.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DASK_")}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "TMPDIR": str(directory), "XDG_STATE_HOME": str(directory / "state")}
    command = [sys.executable, "-u", "-X", "faulthandler", str(SCRIPT), *options]
    said, complained = directory / "stdout", directory / "stderr"
    with said.open("wb") as out, complained.open("wb") as err:
        program = subprocess.Popen(command, env=environment, cwd=directory, stdout=out, stderr=err, start_new_session=True)
        try:
            program.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            # So that its stderr tells where it stood.
            program.send_signal(signal.SIGABRT)
            program.wait()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, program.returncode, said.read_text(), complained.read_text())


def test_the_example_shows_that_the_short_answer_comes_first_and_that_no_answer_differs(tmp_path: Path):
    done = run(tmp_path, "--tokens", str(N_TOKENS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and "error" not in done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == [f"{name} migration: two workers, one slot each ..." for name in ("without", "with")]
    # Each run's answers in the order in which they ended.
    table = [re.split(r"\s{2,}", line.strip()) for line in lines[4:8]]
    (run_1, *row_1), row_2, (run_2, *row_3), row_4 = table
    assert (run_1, run_2) == ("without migration", "with migration")
    rows = [row_1, row_2, row_3, row_4]
    assert [model for model, *_ in rows] == [LONG, SHORT, SHORT, LONG]
    assert [node for _, node, *_ in rows] == ["0", "0", "0", "0 -> 1"]
    n_tokens = [int(row[2]) for row in rows]
    assert n_tokens == [N_TOKENS, n_tokens[1], n_tokens[1], N_TOKENS]
    ended_s = [float(row[3].removesuffix(" s")) for row in rows]
    assert ended_s[0] <= ended_s[1] and ended_s[2] <= ended_s[3]
    *others, moved = [row[4] for row in rows]
    assert others == ["-"] * 3
    assert re.fullmatch(r"\S+ (\S+ of KV|tokens) in .+, the client waited \d+ ms for the next token", moved)
    assert lines[9:-2] == [
        "yes  without migration the short answer came after the long one",
        "yes  with migration the short answer came before the long one",
        "yes  the long answer went on on node 1, the short one ran on node 0",
        "yes  the long answer is the same, token for token",
        "yes  the short answer is the same, token for token",
    ]
    assert re.fullmatch(r"With migration the short answer came .+ sooner: 'My name is demo-qwen\b.*'", lines[-1])
    assert not list(tmp_path.glob("sllmdask-*")), "the model that it made is gone with it"


def test_the_example_refuses_an_answer_of_no_tokens(tmp_path: Path):
    done = run(tmp_path, "--tokens", "0")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("error: --tokens must be 1 or more")
    assert done.stdout == ""
