"""The program: `latentscenes`, and `python -m latentscenes`, as torchrun and job schedulers start it."""

import atexit
import os
import signal
import sys
from contextlib import suppress


def main() -> None:
    """Runs the command line and ends the process. Ctrl-C during the first imports ends it without a word."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = 1
    atexit.register(lambda: _end(code))
    try:
        from latentscenes.cli.main import main as program

        program()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise


def _end(code: int) -> None:
    """Ends the process after all other functions of atexit, since it is registered first. Taking torch apart
    would need 0.3 CPU seconds more, and seconds on a busy machine."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
