"""Models, runs, checkpoints and faults that tests share. `tests/` is on the path: `from helpers import engine`."""
