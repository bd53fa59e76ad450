"""Convert raw text into Megatron's indexed datasets; see minimind_mcore/preprocess (`preprocess/cli.py`)."""

from minimind_mcore.errors import run
from minimind_mcore.preprocess.cli import main

if __name__ == "__main__":
    run(main)
