"""`minimind-mcore doctor`: what is installed here, what goes with it, and what would stop a job.

| | |
|---|---|
| `matrix.json`, `matrix.py` | which versions go together, and who says so |
| `installed.py` | what is installed, found without importing it |
| `host.py` | devices, memory, disk, ports, interfaces, names |
| `job.py` | the paths of one script, from its own dry run |
| `main.py` | the command: gathers, judges, prints |

With `minimind_mcore/platform/device.py` and `minimind_mcore/mindspeed/` the only place that names devices.
"""
