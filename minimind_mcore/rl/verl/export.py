"""Export a run to verl, the successor that MindSpeed-RL's maintainers recommend.

    minimind-mcore rl export-verl grpo_minimind3 --output verl/grpo_minimind3

| file | what |
|---|---|
| model/ | the weights of `actor_config.load` as a Hugging Face directory, with a chat template that adds nothing |
| train.parquet, test.parquet | the prompts, their answers, and the data's records |
| reward.py | the verifiers of `verifier_function` with their weights, for verl; the user's own modules lie next to it |
| run.sh | `python -m verl.trainer.main_ppo` with the YAML's values as verl's keys |
| README.md | the files, and the differences in verl |

This kit's prompts are already rendered with the chat template. verl applies the tokenizer's template to each prompt.
The exported tokenizer therefore has a template that returns texts unchanged, so that verl gets the same ids. The
original template is chat_template.jinja.orig.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import shlex
import shutil
import sysconfig
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from minimind_mcore.errors import UserError
from minimind_mcore.paths import package_json
from minimind_mcore.preprocess.hf_tokenizer import load_tokenizer
from minimind_mcore.preprocess.indexed import datasets_at
from minimind_mcore.rl.algorithms.kl import ALIASES, kind_of
from minimind_mcore.rl.algorithms.table import ALGORITHMS, algorithm
from minimind_mcore.rl.config.load import require_weights
from minimind_mcore.rl.config.objective import objective, overlong_lengths
from minimind_mcore.rl.config.schema import Config, Section
from minimind_mcore.rl.rewards.verifier_pool import resolve
from minimind_mcore.rl.runtime.data import PromptDataset
from minimind_mcore.storage import MANIFEST, atomic_directory

logger = logging.getLogger(__name__)

PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
OWN = "verl registers user functions with @register_policy_loss and @register_adv_est"
KL = {kind: alias for alias, kind in ALIASES.items()} | {"abs": "abs"}
SCHEDULES = ("constant", "cosine")  # of FSDPOptimizerConfig, verl/workers/config/optimizer.py
# verl's engines, with its value of model_engine. On an NPU megatron is MindSpeed's: verl/workers/engine/mindspeed.
ENGINES = {"fsdp": "dp", "megatron": "megatron"}
# Our advantages and policy losses, with verl's algorithm.adv_estimator and policy_loss.loss_mode.
ESTIMATORS = {
    "group": "grpo", "rloo": "rloo", "batch": "reinforce_plus_plus_baseline", "returns": "reinforce_plus_plus",
    "gae": "gae",
}  # fmt: skip
LOSSES = {"clip": "vanilla", "gspo": "gspo", "cispo": "cispo"}
NO_DUAL_CLIP = 1e9  # verl always applies a dual clip; its ratios are at most exp(20), which is below this value

BESIDE = "\nimport sys\nfrom pathlib import Path\n\nsys.path.insert(0, str(Path(__file__).parent))\n"
TEMPLATES = Path(__file__).parent  # reward.py.in, run.sh.in and README.md.in, for str.format


def export(config: Config, name: str, output: Path, engine: str = "fsdp") -> None:
    """Write the directory atomically.

    Raises:
        UserError: verl lacks the algorithm, or the data or the weights do not exist.
    """
    overrides = verl_overrides(config, name, engine)
    with atomic_directory(output) as folder:
        _model(config, folder / "model")
        unseen = _data(config, folder)
        rl, names = config.rl, _reward(config, folder)
        words = "\n".join(f"    {shlex.quote(f'{key}={value}')} \\" for key, value in overrides.items())
        _fill(folder / "run.sh", name=name, overrides=words)
        _fill(
            folder / "README.md",
            name=name,
            prompts=config.actor.global_batch_size,
            samples=rl.n_samples_per_prompt,
            mini=rl.mini_batch_size // rl.n_samples_per_prompt,
            load=config.actor.load,
            verifiers=", ".join(names),
            data=config.actor.data_path,
            unseen=unseen,
            engine=engine,
            differences="\n".join(f"- {line}" for line in differences(config, engine)),
        )


def _fill(file: Path, **values: Any) -> None:
    """Write a file from its template."""
    text = (TEMPLATES / f"{file.name}.in").read_text(encoding="utf-8")
    file.write_text(text.format(**values), encoding="utf-8")


def _reward(config: Config, folder: Path) -> list[str]:
    """Write reward.py and copy the user's own modules next to it. Return the names of the rewards."""
    names = config.reward_names
    copied = [_copy_module(name, folder) for name in names if ":" in name]
    _fill(
        folder / "reward.py",
        names=names,
        weights=config.reward_weights,
        timeout=config.rl.verifier_timeout,
        failures=config.minimind.reward_failure_limit,
        path=BESIDE if any(copied) else "",
    )
    return names


def _copy_module(name: str, folder: Path) -> bool:
    """Copy the file or package of a user's function, unless it is an installed package. Return whether it was copied.

    Raises:
        UserError: the function cannot be imported.
    """
    resolve(name)
    top = name.partition(":")[0].partition(".")[0]
    spec = importlib.util.find_spec(top)
    found = [] if spec is None else [*(spec.submodule_search_locations or []), spec.origin]
    places = [Path(place) for place in found if place]
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib", "stdlib")}
    if not places or top == "minimind_mcore" or installed & set(places[0].resolve().parents):
        return False
    if places[0].is_dir():
        shutil.copytree(places[0], folder / top, ignore=shutil.ignore_patterns("__pycache__", ".*"), dirs_exist_ok=True)
    else:
        shutil.copyfile(places[0], folder / places[0].name)
    return True


def _model(config: Config, folder: Path) -> None:
    """Write the weights in the format of transformers and vLLM."""
    from minimind_mcore.converters.conversion import Conversion, run_conversion

    require_weights(config.actor.load)
    tokenizer = Path(config.actor.tokenizer_name_or_path)
    run_conversion(Conversion(load_dir=Path(config.actor.load), save_dir=folder, tokenizer=tokenizer))
    template = folder / "chat_template.jinja"
    if not template.is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        template.write_text(settings.get("chat_template") or "", encoding="utf-8")
    (folder / MANIFEST).unlink()  # it has the checksum of the template that is replaced
    shutil.move(template, folder / "chat_template.jinja.orig")
    template.write_text(PASS_THROUGH, encoding="utf-8")


def _data(config: Config, folder: Path) -> str:
    """Write the training prompts and the held-out prompts, if any. Return the source of the held-out prompts."""
    actor, unseen = config.actor, config.minimind.eval_data
    _parquet(actor.data_path, folder / "train.parquet", "train", config)
    if unseen and datasets_at(unseen[0]):
        _parquet(unseen[0], folder / "test.parquet", "test", config)
        return unseen[0]
    shutil.copyfile(folder / "train.parquet", folder / "test.parquet")
    return "the same, as there are no held-out prompts"


def _parquet(prefix: str, file: Path, split: str, config: Config) -> None:
    """Write a file in verl's format, in the order of the data. Prompts that are too long are left out."""
    import pyarrow
    import pyarrow.parquet

    tokenizer = load_tokenizer(config.actor.tokenizer_name_or_path)
    prompts = PromptDataset(prefix, (), config.rl.max_prompt_length, shuffle=False, optional=("labels",))
    rows = list(_rows(prompts, tokenizer, Path(prefix).name, split))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    logger.info(f"{file.name}: {len(prompts):,} prompts of {prefix}, {prompts.too_long:,} too long")


def _rows(prompts: PromptDataset, tokenizer: Any, source: str, split: str) -> Iterator[dict[str, Any]]:
    for place in range(len(prompts)):
        prompt = prompts[place]
        answer = tokenizer.decode(prompt.columns.get("labels", []), skip_special_tokens=True)
        yield {
            "data_source": source,
            "prompt": [{"role": "user", "content": tokenizer.decode(prompt.ids)}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {
                "split": split,
                "index": prompt.index,
                "prompt": tokenizer.decode(prompt.ids),
                "record": json.dumps(prompt.record, ensure_ascii=False),
            },
        }


def verl_overrides(config: Config, name: str, engine: str = "fsdp") -> dict[str, Any]:
    """Return the values as verl's keys, without the paths of files.

    Raises:
        UserError: verl's main_ppo lacks the algorithm, or the run has a reward model or a penalty of long responses.
    """
    rl, actor, ours = config.rl, config.actor, config.minimind
    row = algorithm(ours.algorithm)
    if row.advantage not in ESTIMATORS or row.loss not in LOSSES:
        known = ", ".join(name for name, row in ALGORITHMS.items() if row.advantage in ESTIMATORS)
        raise UserError(f"minimind.algorithm: {ours.algorithm} is not in verl's main_ppo; it has {known}")
    for key, why in (("reward_model", "reward.py has rules alone"), ("policy_loss", OWN), ("advantage", OWN)):
        if found := getattr(ours, key):
            raise UserError(f"minimind.{key}: {found} cannot be exported: {why}")
    chosen = objective(config)
    if overlong_lengths(config)[1]:
        raise UserError(
            "rl_config.overlong_buffer_enable: the penalty cannot be exported: reward.py sees texts, not lengths. Set "
            "it to false; verl's reward manager dapo has one (reward.reward_kwargs.overlong_buffer_cfg)"
        )
    if chosen.dynamic_sampling:
        raise UserError("rl_config.filter_groups_enable: verl's main_ppo has no dynamic sampling; set it to false")
    keys = package_json("rl/verl/keys.json")
    places = SimpleNamespace(rl=rl, actor=actor, generate=config.generate, objective=chosen)
    kl, micro, train = KL[kind_of(chosen.kl_kind)], actor.micro_batch_size, "actor_rollout_ref.actor"
    # verl cuts the ratio of CISPO to [1 - low, 1 + high], MiniMind only above.
    low, high = (1.0, chosen.clip_high - 1.0) if chosen.loss == "cispo" else (chosen.clip_low, chosen.clip_high)
    values: dict[str, Any] = {key: attrgetter(name)(places) for key, name in keys["renamed"].items()}
    values |= keys["constant"] | {
        "algorithm.adv_estimator": ESTIMATORS[chosen.advantage],
        "algorithm.norm_adv_by_std_in_grpo": chosen.spread != "none",
        "algorithm.use_kl_in_reward": chosen.kl == "reward",
        "algorithm.kl_penalty": kl,
        "data.shuffle": not actor.no_shuffle,
        "model_engine": ENGINES[engine],
        **_model_keys(train, actor, engine),
        f"{train}.ppo_mini_batch_size": rl.mini_batch_size // rl.n_samples_per_prompt,
        f"{train}.policy_loss.loss_mode": LOSSES[chosen.loss],
        f"{train}.clip_ratio_c": chosen.dual_clip or NO_DUAL_CLIP,
        f"{train}.clip_ratio_low": low,
        f"{train}.clip_ratio_high": high,
        f"{train}.use_kl_loss": chosen.kl == "loss",
        f"{train}.kl_loss_type": kl,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": rl.actor_forward_micro_batch_size or micro,
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": rl.ref_forward_micro_batch_size or micro,
        "trainer.test_freq": ours.eval_interval or -1,
        "trainer.experiment_name": name,
    }
    if ours.algorithm == "ppo":
        critic = config.critic or actor
        values |= _model_keys("critic", critic, engine)
        values["critic.cliprange_value"] = rl.cliprange_value
        values["critic.ppo_micro_batch_size_per_gpu"] = micro
    if rl.use_dynamic_bsz:
        for part, phase in (("actor.ppo", "update"), ("ref.log_prob", "ref"), ("rollout.log_prob", "actor")):
            budget = getattr(rl, f"{phase}_max_packing_token_size")
            values[f"actor_rollout_ref.{part}_max_token_len_per_gpu"] = budget
        values[f"{train}.use_dynamic_bsz"] = True  # verl's other use_dynamic_bsz keys default to this one
    if ours.rollout_correction == "tis":
        values["algorithm.rollout_correction.rollout_is"] = "token"
        values["algorithm.rollout_correction.rollout_is_threshold"] = ours.rollout_correction_cap
    return values


def _model_keys(prefix: str, section: Section, engine: str) -> dict[str, Any]:
    """Return AdamW and its schedule, and for Megatron the parallel sizes. The reference model copies the actor's
    keys."""
    keys = {
        "optim.lr": section.lr,
        "optim.weight_decay": section.weight_decay,
        "optim.betas": f"[{section.adam_beta1},{section.adam_beta2}]",
        "optim.lr_warmup_steps_ratio": section.lr_warmup_fraction or 0.0,
    }
    if engine == "megatron":
        keys |= {"optim.lr_decay_style": section.lr_decay_style, "optim.min_lr": section.min_lr}
        keys["optim.clip_grad"] = section.clip_grad
        sizes = [f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "expert")]
        keys |= {f"megatron.{size}": getattr(section, size) for size in [*sizes, "context_parallel_size"]}
    else:
        cosine = section.lr_decay_style == "cosine"
        keys["optim.lr_scheduler_type"] = "cosine" if cosine else "constant"
        keys["optim.min_lr_ratio"] = section.min_lr / section.lr if cosine and section.lr else 0.0
        keys["grad_clip"] = section.clip_grad
    return {f"{prefix}.{key}": value for key, value in keys.items()}


def differences(config: Config, engine: str = "fsdp") -> Iterator[str]:
    """Yield the settings that differ in verl, one sentence each."""
    ours, chosen = config.minimind, objective(config)
    if engine == "fsdp":
        yield "weights and optimizer are FSDP's; the actor's parallel sizes are not carried over"
        for section in [config.actor, *([config.critic] if config.critic and ours.algorithm == "ppo" else [])]:
            if section.lr_decay_style not in SCHEDULES:
                yield (
                    f"lr_decay_style {section.lr_decay_style} with min_lr {section.min_lr}: verl's FSDP optimizer has "
                    "constant and cosine; run.sh has constant"
                )
    if chosen.spread == "biased":
        yield "advantages are divided by the sample standard deviation, not the population's"
    if chosen.advantage == "group" and chosen.kl == "reward":
        yield "the penalty in the reward is counted token by token before groups are compared"
    if chosen.loss == "gspo":
        yield "the logarithm of a response's ratio is limited to 10, not to 20"
    if config.rl.kl_ctrl_type == "adaptive" and chosen.kl == "loss":
        yield "kl_ctrl_type adaptive has an effect on a penalty in the reward alone"
    if len(ours.eval_data or ()) > 1:
        yield "test.parquet has the first set of eval_data alone"
    if ours.eval_samples > 1:
        yield "the number of responses to a held-out prompt is actor_rollout_ref.rollout.val_kwargs.n: 1"
    if ours.eval_interval:
        yield "test.parquet is scored by reward.py, with verl's own sampling for validation"
    yield "rewards of a response that cannot be scored, and resuming, are verl's own"
