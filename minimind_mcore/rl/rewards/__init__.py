"""Scores of answers: rules by name, the user's own functions, a reward model; weighed and summed by `rewards.Rewards`.

| file            | what                                                                          |
|-----------------|-------------------------------------------------------------------------------|
| rewards.py      | `Rewards`: many answers, several verifiers, failures counted                  |
| verifiers.py    | `VERIFIERS`: MindSpeed-RL's by name, with its scores                          |
| formats.py      | how an answer is laid out: tags, boxes, steps                                 |
| extraction.py   | the answer inside a response, tidied                                          |
| equality.py     | whether two pieces of mathematics are the same                                |
| dapo.py         | DAPO's `Answer: ...`                                                          |
| shaping.py      | MiniMind's own rules                                                          |
| length.py       | DAPO's penalty of overlong answers                                            |
| reward_model.py | a model that scores                                                           |
| workers.py      | processes that are replaced when they hang                                    |
"""
