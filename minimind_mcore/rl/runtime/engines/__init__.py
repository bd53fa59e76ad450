"""Engines that generate responses, behind one protocol (`protocol.py`)."""
