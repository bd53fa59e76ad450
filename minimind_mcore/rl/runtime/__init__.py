"""The embedded trainer: a driver, and the processes that it starts on a Ray cluster.

| file              | what                                                                             |
|-------------------|----------------------------------------------------------------------------------|
| trainer.py        | `train()`: generate, score, compute_advantages, update, sync_weights             |
| rollouts.py       | prompts in, scored responses out                                                 |
| advantages.py     | from rewards to advantages, with the state between steps                         |
| placement.py      | which process runs where: training ranks, rollout engines, rewards               |
| workers/          | these processes as Ray actors                                                    |
| cluster.py        | join or start a Ray cluster, wait for its devices                                |
| supervise.py      | deadlines for calls, replacement of processes that died                          |
| rank.py, jobs.py  | one rank of a model: weights, log-probabilities, updates                         |
| engines/          | what writes responses: transformers or vLLM                                      |
| weight_sync.py    | weights from the ranks to the engines                                            |
| batch.py, data.py | the tensors of a step, the prompts of a dataset                                  |
"""
