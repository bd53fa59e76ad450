"""Convert weights with the flags of MindSpeed-LLM's first convert_ckpt.py, which many guides still show."""

from minimind_mcore.converters.cli import main_v1
from minimind_mcore.errors import run

if __name__ == "__main__":
    run(main_v1)
