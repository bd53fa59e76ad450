"""A run for verl: what MindSpeed-RL's maintainers recommend to move to.

    minimind-mcore rl export-verl grpo_minimind3 --output verl/grpo_minimind3

| file | what |
|---|---|
| model/ | the weights of `actor_config.load` as a Hugging Face directory, with a chat template that adds nothing |
| train.parquet, test.parquet | the prompts as they are, their answers, the records beside them |
| reward.py | the verifiers of `verifier_function` with their weights, as verl's custom_reward_function |
| run.sh | `python -m verl.trainer.main_ppo` with the YAML's values in verl's words |
| README.md | what is where, and what verl has otherwise |

The prompts of this kit hold their template already. verl applies the tokenizer's to each; so that it sees the same
ids the exported tokenizer's passes texts through, and the original stands beside it as chat_template.jinja.orig.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.preprocess.check import datasets_at
from minimind_mcore.rl.config import Config
from minimind_mcore.rl.data import PromptDataset
from minimind_mcore.storage import MANIFEST, atomic_directory

PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
ESTIMATORS = {"group_norm": "grpo", "gae": "gae"}
KL = ("low_var_kl", "kl", "abs", "mse")
ALGORITHMS = ("grpo", "dr_grpo", "cispo", "ppo")

REWARD = '''"""Rewards of this run, for verl's custom_reward_function: the kit must be installed beside verl."""

from minimind_mcore.rl.rewards.rewards import Rewards

NAMES = {names!r}
WEIGHTS = {weights!r}
_rewards = None


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **_):
    """The weighed sum of the verifiers' scores of a response."""
    global _rewards
    if _rewards is None:
        _rewards = Rewards(NAMES, WEIGHTS, timeout={timeout!r}, parallel=1, max_failures={failures!r})
    return float(_rewards.score([solution_str], [ground_truth]).total[0])
'''

SCRIPT = """#!/usr/bin/env bash
# {name} on verl, with vLLM. Further overrides pass through: bash run.sh trainer.nnodes=2
set -euo pipefail
HERE=$(cd "$(dirname "${{BASH_SOURCE[0]}}")" && pwd)
PYTHON=${{PYTHON:-python3}}
# DEVICE: verl's trainer.device, where it is not its default
exec "$PYTHON" -m verl.trainer.main_ppo \\
{overrides}
    ${{DEVICE:+"trainer.device=$DEVICE"}} \\
    data.train_files="$HERE/train.parquet" \\
    data.val_files="$HERE/test.parquet" \\
    actor_rollout_ref.model.path="$HERE/model" critic.model.path="$HERE/model" \\
    custom_reward_function.path="$HERE/reward.py" \\
    trainer.default_local_dir="$HERE/checkpoints" \\
    "$@"
"""

README = """# {name} on verl

Written by `minimind-mcore rl export-verl`. `bash run.sh` trains where verl, vLLM and this kit are installed in one
Python; DEVICE is verl's trainer.device, for an Ascend host. The keys are those of verl of 2026-01, against whose
configuration they were checked; no training was run.

| MindSpeed-RL | here |
|---|---|
| global_batch_size {prompts}, n_samples_per_prompt {samples} | data.train_batch_size, actor_rollout_ref.rollout.n |
| mini_batch_size {mini}, in prompts | actor_rollout_ref.actor.ppo_mini_batch_size, in prompts too |
| load {load} | model/: fp32 or bf16 as the checkpoint, trained by FSDP, not Megatron |
| verifier_function {verifiers} | reward.py |
| data_path {data} | train.parquet; test.parquet has {unseen} |

The chat template in model/ passes prompts through, as they hold theirs already; to chat with the trained model put
chat_template.jinja.orig back in its place.
"""


def export(config: Config, name: str, output: Path) -> None:
    """Write the directory; it appears whole or not at all.

    Raises:
        UserError: verl has no such algorithm, or the data or the weights are not there.
    """
    overrides = verl_overrides(config, name)
    with atomic_directory(output) as folder:
        _model(config, folder / "model")
        unseen = _data(config, folder)
        rl, ours = config.rl, config.minimind
        names = [*rl.verifier_function, *(reward.path for reward in ours.rewards)]
        weights = [*rl.verifier_weight, *(reward.weight for reward in ours.rewards)]
        reward = REWARD.format(
            names=names, weights=weights, timeout=rl.verifier_timeout, failures=ours.reward_failure_limit
        )
        (folder / "reward.py").write_text(reward, encoding="utf-8")
        words = "\n".join(f"    {shlex.quote(f'{key}={value}')} \\" for key, value in overrides.items())
        (folder / "run.sh").write_text(SCRIPT.format(name=name, overrides=words), encoding="utf-8")
        readme = README.format(
            name=name,
            prompts=config.actor.global_batch_size,
            samples=rl.n_samples_per_prompt,
            mini=rl.mini_batch_size // rl.n_samples_per_prompt,
            load=config.actor.load,
            verifiers=", ".join(names),
            data=config.actor.data_path,
            unseen=unseen,
        )
        (folder / "README.md").write_text(readme, encoding="utf-8")


def _model(config: Config, folder: Path) -> None:
    """The weights as transformers and vLLM load them."""
    from minimind_mcore.converters.job import Job, run_job
    from minimind_mcore.converters.sharding import Sharding

    if not config.actor.load or not Path(config.actor.load).exists():
        raise UserError(f"actor_config.load: {config.actor.load} does not exist; expected the weights to begin with")
    tokenizer = Path(config.actor.tokenizer_name_or_path)
    job = Job(
        load_dir=Path(config.actor.load), save_dir=folder, save_type="hf", sharding=Sharding(), tokenizer=tokenizer
    )
    run_job(job)
    template = folder / "chat_template.jinja"
    if not template.is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template.write_text(settings.get("chat_template") or "", encoding="utf-8")
    (folder / MANIFEST).unlink()  # it has the sum of the template that is replaced
    shutil.move(template, folder / "chat_template.jinja.orig")
    template.write_text(PASS_THROUGH, encoding="utf-8")


def _data(config: Config, folder: Path) -> str:
    """Prompts to train on and, if there are any, held-out ones; returns where the latter are from."""
    actor, unseen = config.actor, config.minimind.eval_data
    _parquet(actor.data_path, folder / "train.parquet", "train", config)
    if unseen and datasets_at(unseen):
        _parquet(unseen, folder / "test.parquet", "test", config)
        return unseen
    shutil.copyfile(folder / "train.parquet", folder / "test.parquet")
    return "the same, as there are no held-out prompts"


def _parquet(prefix: str, file: Path, split: str, config: Config) -> None:
    """A file in verl's form, in the order of the data; too long prompts are left out."""
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.actor.tokenizer_name_or_path)
    prompts = PromptDataset(prefix, ("labels",), config.rl.max_prompt_length, shuffle=False)
    rows = list(_rows(prompts, tokenizer, Path(prefix).name, split))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    print(f"{file.name}: {len(prompts):,} prompts of {prefix}, {prompts.too_long:,} too long")


def _rows(prompts: PromptDataset, tokenizer: Any, source: str, split: str) -> Iterator[dict[str, Any]]:
    for place in range(len(prompts)):
        prompt = prompts[place]
        answer = tokenizer.decode(prompt.columns["labels"], skip_special_tokens=True)
        record = {key: value for key, value in prompt.record.items() if key not in ("prompt", "messages", "tools")}
        yield {
            "data_source": source,
            "prompt": [{"role": "user", "content": tokenizer.decode(prompt.ids)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"split": split, "index": prompt.index, "record": json.dumps(record, ensure_ascii=False)},
        }


def verl_overrides(config: Config, name: str) -> dict[str, Any]:
    """The values in verl's words, less the paths of files.

    Raises:
        UserError: an algorithm that verl's main_ppo does not have, or a reward model.
    """
    rl, actor, ours = config.rl, config.actor, config.minimind
    if ours.algorithm not in ALGORITHMS:
        known = ", ".join(ALGORITHMS)
        raise UserError(f"minimind.algorithm: {ours.algorithm} is not in verl's main_ppo; it has {known}")
    if ours.reward_model:
        raise UserError(f"minimind.reward_model: {ours.reward_model} cannot be exported: reward.py has rules alone")
    values: dict[str, Any] = {
        "algorithm.adv_estimator": ESTIMATORS.get(rl.adv_estimator, "grpo"),
        "algorithm.norm_adv_by_std_in_grpo": ours.algorithm != "dr_grpo",
        "algorithm.use_kl_in_reward": rl.use_kl_in_reward,
        "algorithm.gamma": rl.gamma,
        "algorithm.lam": rl.lam,
        "algorithm.kl_ctrl.kl_coef": rl.init_kl_coef,
        "data.train_batch_size": actor.global_batch_size,
        "data.max_prompt_length": rl.max_prompt_length,
        "data.max_response_length": config.generate.sampling_config.max_tokens,
        "data.shuffle": not actor.no_shuffle,
        **{f"actor_rollout_ref.actor.{key}": value for key, value in _actor(config).items()},
        **{f"actor_rollout_ref.rollout.{key}": value for key, value in _rollout(config).items()},
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": rl.ref_forward_micro_batch_size
        or actor.micro_batch_size,
        "trainer.n_gpus_per_node": rl.actor_resource.num_npus,
        "trainer.nnodes": 1,
        "trainer.total_training_steps": actor.train_iters,
        "trainer.save_freq": actor.save_interval,
        "trainer.test_freq": ours.eval_interval or -1,
        "trainer.project_name": "minimind",
        "trainer.experiment_name": name,
        "trainer.logger": '["console","tensorboard"]',
        "custom_reward_function.name": "compute_score",
    }
    if ours.algorithm == "ppo":
        values["critic.optim.lr"] = config.critic.lr if config.critic else actor.lr
        values["critic.cliprange_value"] = rl.cliprange_value
        values["critic.ppo_micro_batch_size_per_gpu"] = actor.micro_batch_size
    if ours.rollout_correction == "tis":
        values["algorithm.rollout_correction.rollout_is"] = "token"
        values["algorithm.rollout_correction.rollout_is_threshold"] = ours.rollout_correction_cap
    return values


def _actor(config: Config) -> dict[str, Any]:
    """Optimizer, mini-batches and loss."""
    rl, actor, ours = config.rl, config.actor, config.minimind
    low, high = (rl.clip_ratio_low, rl.clip_ratio_high) if rl.clip_higher_enable else (rl.clip_ratio, rl.clip_ratio)
    if ours.algorithm == "cispo":
        low, high = 1.0, ours.cispo_clip - 1.0
    return {
        "optim.lr": actor.lr,
        "optim.weight_decay": actor.weight_decay,
        "grad_clip": actor.clip_grad,
        "ppo_mini_batch_size": rl.mini_batch_size // rl.n_samples_per_prompt,
        "ppo_micro_batch_size_per_gpu": actor.micro_batch_size,
        "ppo_epochs": rl.epochs,
        "shuffle": rl.shuffle_mini_batch,
        "policy_loss.loss_mode": "cispo" if ours.algorithm == "cispo" else "vanilla",
        "clip_ratio": rl.clip_ratio,
        "clip_ratio_low": low,
        "clip_ratio_high": high,
        "entropy_coeff": rl.entropy_coeff,
        "loss_agg_mode": "token-mean" if rl.token_level_loss else "seq-mean-token-mean",
        "use_kl_loss": not rl.use_kl_in_reward and rl.init_kl_coef > 0,
        "kl_loss_coef": rl.init_kl_coef,
        "kl_loss_type": rl.kl_penalty if rl.kl_penalty in KL else "low_var_kl",
    }


def _rollout(config: Config) -> dict[str, Any]:
    """vLLM and sampling."""
    generate, sampling = config.generate, config.generate.sampling_config
    return {
        "name": "vllm",
        "n": config.rl.n_samples_per_prompt,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "tensor_model_parallel_size": generate.infer_tensor_parallel_size,
        "gpu_memory_utilization": generate.gpu_memory_utilization,
        "max_num_seqs": generate.max_num_seqs,
        "log_prob_micro_batch_size_per_gpu": config.rl.actor_forward_micro_batch_size or config.actor.micro_batch_size,
    }
