"""Ray actors, and the groups of them that the trainer talks to."""
