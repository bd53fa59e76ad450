"""The YAML of a run of reinforcement learning.

| file         | what                                                                                         |
|--------------|----------------------------------------------------------------------------------------------|
| schema.py    | the keys of every section with their defaults and types, and `Config`, the resolved YAML       |
| load.py      | read, compose and resolve a YAML; a section as Megatron's flags                              |
| objective.py | the algorithm of a configuration, and which keys change it                                   |
| check.py     | the rules that a resolved configuration must fulfil, each of them once                       |
| migrate.py   | rewrite the keys that older guides show                                                      |
| lint.py      | all of it together: what `minimind-mcore rl lint`, `train_grpo.py` and `train_ppo.py` report |
"""
