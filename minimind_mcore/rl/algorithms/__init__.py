"""The formulas of reinforcement learning in plain torch, without Ray and without Megatron.

| file          | what                                                                                   |
|---------------|----------------------------------------------------------------------------------------|
| table.py      | `ALGORITHMS`: for each algorithm its advantage, its policy loss and its KL term        |
| advantages.py | advantages: of groups (GRPO), from a critic (GAE), against a running baseline (SPO)    |
| groups.py     | statistics of the groups, and dynamic sampling                                         |
| kl.py         | KL divergence from the reference model, and its coefficient                            |
| losses.py     | policy loss, aggregation over tokens, value loss                                       |
| actor.py      | the actor's loss of one micro-batch, which combines these parts                        |
| batches.py    | epochs and mini-batches                                                                |
| masked.py     | sums and means over the tokens of the mask                                             |

Shapes: B responses (the samples of one prompt are neighbours), T response tokens, padded. `mask` [B, T] is 1 on the
tokens that the model generated and 0 elsewhere. Metrics have MindSpeed-RL's names.

Users can supply a policy loss or an advantage: the YAML names the function by its import path (`minimind.policy_loss`,
`minimind.advantage`). `losses.POLICY_LOSSES` and `advantages.ADVANTAGES` define the signatures.
"""
