"""The MiniMind layer spec (being written)."""
