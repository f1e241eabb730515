"""Waiting for what other processes do."""

import time


def wait_for(holds, *processes):
    """Waits until `holds()` is true. Fails if one of the processes ends before, or after minutes."""
    deadline = time.monotonic() + 400  # a busy machine starts processes slowly
    while not holds():
        assert time.monotonic() < deadline
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def wait_for_checkpoint(out, above, *processes):
    """Waits for a checkpoint of the run `out` after more steps than `above`."""

    def saved():
        steps = [int(path.name) for path in out.glob("checkpoints/*") if path.name.isdigit()]
        return (out / "run.json").exists() and max(steps, default=-1) > above

    wait_for(saved, *processes)
