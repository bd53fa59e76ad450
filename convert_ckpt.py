"""Convert weights with the flags of MindSpeed-LLM's first convert_ckpt.py, which many guides still show."""

from minimind_mcore.cli import program

if __name__ == "__main__":
    program(__file__)
