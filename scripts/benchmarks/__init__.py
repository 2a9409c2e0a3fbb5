"""The benchmarks of scripts/bench: one module each, with `run(Setup) -> Comparison`."""
