"""The mathematics of reinforcement learning from rewards: plain torch, no Ray, no Megatron.

| file          | what                                                                         |
|---------------|------------------------------------------------------------------------------|
| table.py      | `ALGORITHMS`: each algorithm as its choice among the parts below             |
| advantages.py | how much better than expected: groups (GRPO), critic (GAE), baseline (SPO)   |
| groups.py     | statistics of the groups, and which to train on (dynamic sampling)           |
| kl.py         | distance to the reference model, and its coefficient                         |
| losses.py     | policy loss, aggregation over tokens, value loss                             |
| actor.py      | all of it together: the loss of one micro-batch                              |
| batches.py    | epochs and mini-batches                                                      |
| masked.py     | means over the tokens that count                                             |

Shapes: B responses (the samples of one prompt are neighbours), T response tokens, padded; `mask` [B, T] is 1 on the
tokens that the model wrote and 0 elsewhere. Names of metrics are MindSpeed-RL's.

A user's own policy loss or advantage is a function that the YAML names by its import path (`minimind.policy_loss`,
`minimind.advantage`). See `losses.POLICY_LOSSES` and `advantages.ADVANTAGES` for the signatures.
"""
