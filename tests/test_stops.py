"""Commands end soon at Ctrl-C and SIGTERM, with one line or without a word, and leave nothing behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from latentscenes.cli.common import errors_in_one_line
from latentscenes.storage.index import Index


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_by_a_signal_takes_one_line_and_leaves_nothing(number, status, capsys, tmp_path):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        with tempfile.TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)
            time.sleep(10)
    err = capsys.readouterr().err
    assert stop.value.code == status and err.startswith("latentscenes: stopped.") and err.count("\n") == 1
    assert not list(tmp_path.iterdir()) and signal.getsignal(number) == before


def test_a_stop_while_a_module_is_imported_is_not_lost(capsys, tmp_path, monkeypatch):
    """trimesh, for one, keeps any error of the packages that it looks for, and goes on. What tidies up after
    the stop may import, too."""
    (tmp_path / "keeps_errors.py").write_text(
        "import os, signal, time\nwhole, kept, tidied = False, None, False\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.2)\n    whole = True\n"
        "except BaseException:\n    pass\n"
        "try:\n    import absent_package\n"
        "except BaseException as error:\n"
        "    kept = type(error)\n    import tidying_package\n    time.sleep(0.2)\n    tidied = True\n"
    )
    (tmp_path / "tidying_package.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    before = list(sys.meta_path)
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        import keeps_errors

        time.sleep(10)
    assert stop.value.code == 130 and "stopped" in capsys.readouterr().err
    assert keeps_errors.whole and keeps_errors.kept is KeyboardInterrupt and keeps_errors.tidied
    assert sys.meta_path == before
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            raise TypeError("what a package made of it") from None
    assert stop.value.code == 143 and capsys.readouterr().err.count("\n") == 1


def test_a_stop_while_a_package_loads_comes_at_its_next_module(capsys, tmp_path, monkeypatch):
    """Packages load for seconds on a busy machine. They need not be finished."""
    (tmp_path / "large_package.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport next_module\n"
    )
    (tmp_path / "next_module.py").write_text("raise SystemExit('this is too late')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop, errors_in_one_line():
        import large_package  # noqa: F401
    assert stop.value.code == 130 and capsys.readouterr().err.count("\n") == 1


def program(words, folder, **changes):
    """Runs `python -m latentscenes`, which finds modules in a folder first, and hears Ctrl-C also where the
    tests do not, as in the background of a shell."""
    path = os.pathsep.join([str(folder), *sys.path])
    return subprocess.run(
        [sys.executable, "-m", "latentscenes", *words],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path} | changes, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_during_the_first_imports_ends_without_a_word(number, tmp_path):
    (tmp_path / "tyro.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nraise OSError\n")
    ended = program(["--help"], tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-number, "", "")


def test_the_program_ends_at_once_but_finishes_what_is_to_be_finished(tmp_path):
    """Functions of atexit are called, output is written, and indices are closed, which takes in their
    journals. Nothing is taken apart. The status is that of the command."""
    (tmp_path / "yaml.py").write_text(
        "import atexit, sys\n"
        "class Large:\n    def __del__(self):\n        print('taken apart')\n"
        "sys.large = Large()\n"
        "def at_exit():\n    print('finished', Index)\n"
        "from latentscenes.storage.index import Index\nfrom pathlib import Path\n"
        f"sys.index = Index(Path({str(tmp_path / 'index.sqlite')!r}))\nsys.index.names()\n"
        "atexit.register(at_exit)\n"
        "class YAMLError(Exception): pass\n"
        "raise SystemExit(5)\n"
    )
    Index.create(tmp_path / "index.sqlite").close()
    ended = program(["cost", "--config", "small"], tmp_path, PYTHONUNBUFFERED="")
    assert ended.returncode == 5 and ended.stderr == "" and ended.stdout.startswith("finished"), ended
    assert "taken apart" not in ended.stdout and not (tmp_path / "index.sqlite-wal").exists()
    assert program(["train", "--data", "nowhere", "--out", "run"], tmp_path / "absent").returncode == 2
