"""`minimind-mcore doctor`: check what is installed, which versions fit together, and what would stop a job.

| | |
|---|---|
| `matrix.json`, `matrix.py` | which versions fit together, with sources |
| `installed.py` | what is installed, found without importing it |
| `host.py` | devices, memory, disk, ports, interfaces, names |
| `dry_run.py` | the paths of one script, from its own dry run |
| `main.py` | the command: gathers, judges, prints |

Code may name CUDA or NPU only here, in `platform/`, `mindspeed/`, `hosts.py` and the rehearsal (test_guards.py).
"""
