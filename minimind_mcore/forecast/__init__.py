"""Forecasts of memory and time, before anything runs: for dry runs, for `doctor` and for `minimind-mcore plan`.

| file | |
|---|---|
| `memory.py` | bytes of one rank, by what they are for |
| `speed.py` | seconds of one step, and bytes sent, by what they are for |
| `machines.py` | the devices, from `machines.json`: each number with its source |
| `layouts.py` | layouts of a model on a number of devices, the fastest first; scaling |
| `main.py` | the command |

docs/plan.md has the formulas in words.
"""
