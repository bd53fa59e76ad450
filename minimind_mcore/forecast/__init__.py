"""Forecasts of memory and time before a run: for dry runs, for `doctor` and for `minimind-mcore plan`.

| file | |
|---|---|
| `memory.py` | bytes of one rank, by purpose |
| `speed.py` | seconds of one step, and bytes sent, by purpose |
| `machines.py` | the devices of `machines.json`: each number with its source |
| `layouts.py` | layouts of a model on a number of devices, the fastest first; scaling |
| `main.py` | the command |

docs/plan.md explains the formulas.
"""
