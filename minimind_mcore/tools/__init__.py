"""Tools that a model calls: the parser of replies, the registry, and the processes in which tools run."""
