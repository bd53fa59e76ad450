"""The training manager: `minimind-mcore manager` starts, shows and stops jobs over HTTP."""
