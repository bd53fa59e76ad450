"""Evaluate; flags as MindSpeed-LLM's evaluation.py."""

from minimind_mcore import errors
from minimind_mcore.inference import evaluation

if __name__ == "__main__":
    errors.run(evaluation.main)
