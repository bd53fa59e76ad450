"""Runs on MindSpeed-LLM and MindSpeed-RL. Only this package and `platform/ascend.py` touch MindSpeed's code."""
