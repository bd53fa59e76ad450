"""Engines that write responses, behind one protocol (`engine.py`)."""
