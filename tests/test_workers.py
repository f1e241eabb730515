"""Work in several processes: results, errors, and every way to be stopped."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from waiting import wait_for

from latentscenes.core.errors import Interrupted, UserError
from latentscenes.core.processes import side_by_side
from latentscenes.core.runtime import StopFlag


def squarer():
    return lambda number: (number**2, os.getpid())


def refuser():
    def refuse(number):
        if number == 2:
            raise UserError("two: never heard of it. Ask for another.")
        return number

    return refuse


def breaker():
    return lambda number: 1 / number


def victim():
    return lambda number: os.kill(os.getpid(), signal.SIGKILL)


def patient(folder):
    """Returns work that goes on until a stop signal, and then saves."""

    def work(name):
        with StopFlag() as stopped:
            (folder / f"{name}.begun").touch()
            while not stopped:
                time.sleep(0.02)
            time.sleep(0.3)
            (folder / f"{name}.saved").touch()
            raise Interrupted

    return work


def test_every_item_is_worked_on_once_and_elsewhere():
    found = list(side_by_side(squarer, range(6), 2))
    assert sorted(square for square, _ in found) == [number**2 for number in range(6)]
    assert os.getpid() not in {worker for _, worker in found}


@pytest.mark.parametrize(
    ("prepare", "error", "words"),
    [
        (refuser, UserError, "^two: never heard of it. Ask for another.$"),
        (breaker, RuntimeError, "ZeroDivisionError"),
        (victim, UserError, r"exit code -9.*fewer --workers"),
    ],
)
def test_errors_of_workers_reach_the_parent(prepare, error, words):
    with pytest.raises(error, match=words):
        list(side_by_side(prepare, [0, 2], 2))


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from latentscenes.core.errors import Interrupted
from latentscenes.core.processes import side_by_side
from test_workers import patient
try:
    list(side_by_side(partial(patient, Path(sys.argv[2])), ["a", "b"], 2))
except Interrupted:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", ["keyboard", "terminate", "kill"])
def test_stopping_stops_all_after_they_saved(how, tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: len(list(tmp_path.glob("*.begun"))) == 2)
        if how == "keyboard":
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        else:
            process.send_signal(signal.SIGTERM if how == "terminate" else signal.SIGKILL)
        assert process.wait(400) == (-signal.SIGKILL if how == "kill" else 130)
        wait_for(lambda: len(list(tmp_path.glob("*.saved"))) == 2)
        assert "Traceback" not in process.communicate()[1]
    finally:
        process.kill()
