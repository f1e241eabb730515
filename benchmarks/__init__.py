"""Programs that measure speed and quality. Run them with `python -m benchmarks.NAME`."""
