"""Rewards: verifiers by name, the user's own functions and a reward model. `rewards.Rewards` adds them with weights.

| file             | what                                                                         |
|------------------|------------------------------------------------------------------------------|
| rewards.py       | `Rewards`: score a batch with several verifiers, and count failures          |
| verifiers.py     | `VERIFIERS`: MindSpeed-RL's verifiers by name, with the same scores          |
| formats.py       | formats of responses: tags, boxes, steps                                     |
| extraction.py    | extract the answer from a response, and normalize it                         |
| equality.py      | compare two mathematical expressions                                         |
| dapo.py          | DAPO's `Answer: ...`                                                         |
| shaping.py       | MiniMind's own rules                                                         |
| length.py        | DAPO's penalty of overlong responses                                         |
| reward_model.py  | scores by a reward model                                                     |
| verifier_pool.py | worker processes that are replaced when they hang                            |
"""
