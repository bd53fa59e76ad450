"""Reinforcement learning: algorithms and rewards as plain functions, and the Ray trainer that runs them."""
