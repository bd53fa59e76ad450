"""A run for verl: the YAML of this kit in the words of verl."""
