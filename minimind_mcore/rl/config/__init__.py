"""The YAML configuration of a reinforcement learning run.

| file         | what                                                                                         |
|--------------|----------------------------------------------------------------------------------------------|
| schema.py    | the keys of every section with their defaults and types, and `Config`, the resolved YAML       |
| load.py      | read, compose and resolve a YAML; a section as Megatron's flags                              |
| objective.py | the algorithm of a configuration, and which keys change it                                   |
| check.py     | the rules for a resolved configuration                                                       |
| migrate.py   | rewrite keys of older guides                                                                 |
| lint.py      | the linter, used by `minimind-mcore rl lint`, `train_grpo.py` and `train_ppo.py`              |
"""
