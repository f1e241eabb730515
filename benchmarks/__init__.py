"""Programs that measure speed and quality; run them with `python -m benchmarks.NAME`. Not part of the package."""
