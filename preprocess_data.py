"""Convert raw text into Megatron's indexed datasets; see minimind_mcore/preprocess (`preprocess/main.py`)."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
