"""Weights from any MiniMind format to any other."""
