"""Export a run to verl."""
