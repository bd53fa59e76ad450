"""Read, compose and resolve the YAML of a reinforcement learning run.

    config = resolve(compose("grpo_minimind_tiny", ["actor_config.lr=1e-5"]))
    config.actor.seq_length, config.rl.clip_ratio, config.generate.sampling_config.temperature
    config.minimind.algorithm

    megatron_flags(config.actor)        # for minimind_mcore.arguments.parse

The sections have the meaning of MindSpeed-RL (its cli/train_grpo.py and mindspeed_rl/config_cls). The actor's keys are
those of its model, overridden by megatron_training, overridden by actor_config. A key that is left out has
MindSpeed-RL's default. `schema.MiniMindConfig` defines the section `minimind`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minimind_mcore import paths
from minimind_mcore.arguments import IMPLEMENTED, NO_EFFECT
from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.inputs.documents import composed_files
from minimind_mcore.inputs.flags import flag_table
from minimind_mcore.preprocess.indexed import datasets_at
from minimind_mcore.rl.config import schema
from minimind_mcore.rl.config.objective import ConfigLayer, command_line, layer_of, replaced
from minimind_mcore.rl.config.schema import (
    MEGATRON_SECTIONS,
    NEWEST,
    SECTIONS,
    Config,
    MiniMindConfig,
    Section,
    defaults,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

CONFIGS = paths.CONFIGS / "rlxf"


def resolve(tree: Mapping[str, Any] | DictConfig) -> Config:
    """Resolve a composed YAML to a `Config`.

    Raises:
        UserError: an unknown section or key, a value of the wrong type, an undefined model, or several data paths.
    """
    keys = plain(tree)
    minimind = schema.minimind_config(keys.get("minimind"))
    schema.refuse(schema.keys(keys, NEWEST), "the configuration")
    rl = _merged("RLConfig", keys["rl_config"])
    rl["mini_batch_size"] *= rl["n_samples_per_prompt"]
    rl |= {key: Section(**value) for key, value in rl.items() if key.endswith("_resource") and value is not None}
    megatron = {name: _megatron(keys, name, minimind) for name in MEGATRON_SECTIONS[1:] if name in keys}
    generate = _merged("GenerateConfig", keys["generate_config"])
    sampling = keys["generate_config"].get("sampling_config") or {}
    generate["sampling_config"] = Section(**{**defaults("GenerateConfig")["sampling_config"], **sampling})
    if minimind.precision != "bf16":
        generate["dtype"] = {"fp32": "float32", "fp16": "float16"}[minimind.precision]
    unseen = f"{megatron['actor_config'].data_path}_unseen"
    if minimind.eval_data is None and datasets_at(unseen):
        minimind = dataclasses.replace(minimind, eval_data=(unseen,))
    actor = megatron["actor_config"]
    if "ref_config" in megatron and not megatron["ref_config"].load:
        # The reference has the weights with which the actor starts. Those of LoRA are the base, without adapters.
        base = actor.pretrained_checkpoint if actor.lora_target_modules else None
        megatron["ref_config"] = Section(**{**vars(megatron["ref_config"]), "load": base or actor.load})
    return Config(
        model=str(keys["actor_config"].get("model") or keys["megatron_training"].get("model")),
        actor=actor,
        ref=actor if rl["use_integrated_worker"] else megatron.get("ref_config", actor),
        reward=megatron.get("reward_config"),
        critic=megatron.get("critic_config"),
        rl=Section(**rl),
        generate=Section(**generate),
        minimind=minimind,
        tree=keys,
    )


def plain(tree: Mapping[str, Any] | DictConfig) -> dict[str, Any]:
    """Return the tree as dicts and lists, with every `${...}` replaced by its value."""
    if isinstance(tree, dict):
        return tree
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _merged(reader: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a class updated with the given values. `-` in a key becomes `_`, as in MindSpeed-RL."""
    return {**defaults(reader), **{key.replace("-", "_"): value for key, value in given.items() if key != "model"}}


def model_keys(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the keys of a model of the group `model`.

    Raises:
        UserError: the group has no such model.
    """
    models = tree.get("model") or {}
    if name not in models:
        raise UserError(
            f"model {name!r} is not defined: found {', '.join(models) or 'none'}. `defaults: - model: [{name}]` loads "
            f"model/{name}.yaml, whose top key must be {name}"
        )
    return dict(models[name])


def _megatron(tree: Mapping[str, Any], section: str, minimind: MiniMindConfig) -> Section:
    """Merge a model's keys, megatron_training and the section, and set the precision of `minimind`."""
    given = {**tree["megatron_training"], **tree[section]}
    model = model_keys(tree, str(given["model"])) if "model" in given else {}
    merged = _merged("MegatronConfig", {**model, **given})
    if isinstance(prefixes := merged["data_path"], list):
        if len(prefixes) != 1:
            why = f"found {prefixes}, expected one prefix. Convert the data to one prefix"
            raise UserError(f"megatron_training.data_path: {why}")
        merged["data_path"] = str(prefixes[0])
    merged["bf16"] = merged["bf16"] and minimind.precision == "bf16"
    if minimind.precision == "fp16":  # MindSpeed-RL has no such key
        merged["fp16"] = True
        if merged["initial_loss_scale"] == 2**32:  # MindSpeed-RL's default overflows, and halves only once per step
            merged["initial_loss_scale"] = 2**16
    merged["pad_to_multiple_of"] = merged["tensor_model_parallel_size"] * merged["context_parallel_size"]
    return Section(**merged)


# Megatron's flags

# The native engine has these keys if the first one is given.
LORA = frozenset({"lora_target_modules", "lora_r", "lora_alpha"})
# Keys that the reinforcement learning trainer reads itself, or whose behaviour it always has.
OF_THE_TRAINER = frozenset(
    """
    use_mcore_models
    stage algorithm data_path split dataset_additional_keys is_instruction_dataset is_pairwise_dataset prompt_type
    prompt_type_path no_shuffle full_shuffle_instruction_dataset no_shared_storage tokenizer_padding_side
    variable_seq_lengths no_pad_to_seq_lengths pad_to_multiple_of reset_position_ids reset_attention_mask
    do_sample use_kv_cache load_checkpoint_loosely
    """.split()
)


def megatron_flags(section: Section) -> list[str]:
    """Return the section as a command line for `minimind_mcore.arguments.parse`.

    The conversion is MindSpeed-RL's: a list becomes several words, True becomes the flag alone, None and False add
    nothing. Keys that the trainer reads itself are left out. So are features that the native engine lacks, if the key
    has MindSpeed-RL's default.

    Raises:
        UserError: a key asks for a feature that the native engine lacks.
    """
    known, flags = defaults("MegatronConfig", NEWEST), []
    missing = lacking(vars(section))
    for key, value in vars(section).items():
        flag = "--" + key.replace("_", "-")
        if key in OF_THE_TRAINER or value is None or value is False:
            continue
        if key in missing:
            if value == known[key]:
                continue
            raise UserError(f"{key}: {value!r}: the native engine does not have this; leave it out, or run on an NPU")
        flags += [flag] if value is True else [flag, *map(str, value if isinstance(value, list) else [value])]
    if section.num_experts and not section.norm_topk_prob:  # MindSpeed-RL has no key for this flag
        flags.append("--moe-router-pre-softmax")
    return flags


def lacking(section: Mapping[str, Any]) -> set[str]:
    """Return the keys of a section that ask for a feature the native engine lacks."""
    table, found = flag_table(), set()
    known = IMPLEMENTED | NO_EFFECT | (LORA if section.get("lora_target_modules") else frozenset())
    for given, value in section.items():
        key = str(given).replace("-", "_")
        record = table.get("--" + key.replace("_", "-"))
        if key in OF_THE_TRAINER or key == "model" or value is None or value is False:
            continue
        if record is None or record["dest"] not in known:
            found.add(key)
    return found


# Reading the files


def compose(
    name: str,
    overrides: Sequence[str] = (),
    directory: str | Path | None = None,
    device: str | None = None,
    beside: Path | None = None,
    quiet: bool = False,
) -> DictConfig:
    """Compose a YAML file with its groups, the file of its device, and the overrides, which take precedence.

    A value of `rl_config` that was set for another algorithm than the one chosen later is dropped and printed (see
    `objective`).

    Args:
        name: name of a file in `directory`, with or without `.yaml`.
        overrides: hydra overrides: "rl_config.clip_ratio=0.1", "+rl_config.gamma=0.9".
        directory: directory of the YAML files (default: the kit's configs/rlxf).
        device: name of a file in `device/`, used if it exists (default: the device found). "none" keeps the values
            of the YAML, which are meant for an Ascend 910B.
        beside: another directory with groups.
        quiet: do not print the dropped values.

    Raises:
        UserError: the file does not exist, or hydra cannot compose it.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from minimind_mcore.platform import device as devices

    where = Path(directory or CONFIGS).expanduser().resolve()
    name = name.removesuffix(".yaml")
    if not (where / f"{name}.yaml").is_file():
        found = sorted(file.stem for file in where.glob("*.yaml")) if where.is_dir() else []
        raise UserError(f"{where} has no {name}.yaml{did_you_mean(name, found)} (it has {', '.join(found) or 'none'})")
    for file, content in composed_files(where, name).items():
        for section in (*SECTIONS, "minimind") if isinstance(content, dict) else ():
            if not isinstance(content.get(section, {}), dict | None):
                raise UserError(f"{file}: {section}: found {content[section]!r}, expected a mapping of keys")
    kind = device or devices.current().kind
    # Models and devices of the kit can be named from YAML files in any directory.
    others = [folder for folder in (beside, CONFIGS) if folder is not None and folder != where]
    known = any((folder / "device" / f"{kind}.yaml").is_file() for folder in (where, *others))
    here = [f"+device={kind}"] if known else []
    quoted = [json.dumps(f"file://{folder}", ensure_ascii=False) for folder in others]  # white space in paths
    here += [f"hydra.searchpath=[{','.join(quoted)}]"] if others else []
    GlobalHydra.instance().clear()
    try:
        with warnings.catch_warnings(), hydra.initialize_config_dir(config_dir=str(where), version_base=None):
            warnings.filterwarnings("ignore", "In .*: Defaults list is missing `_self_`")  # as in MindSpeed-RL's files
            words = [*here, *map(_settable, overrides)]
            tree = hydra.compose(config_name=name, overrides=words)
            layers = _layers(name, words, [where, *others])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"{where / name}.yaml: {str(error).strip()}") from error
    _leave_out_replaced(tree, layers, quiet)
    return tree


def _layers(name: str, overrides: list[str], folders: Sequence[Path]) -> list[ConfigLayer]:
    """Return the layers that hydra merges: the files in its order, then the command line. Needs an initialized hydra.

    hydra.compose returns only the merged tree, so the files of its defaults list are read a second time.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    loader = GlobalHydra.instance().config_loader()
    found = loader.compute_defaults_list(config_name=name, overrides=overrides, run_mode=RunMode.RUN)
    layers = []
    for default in found.defaults:
        files = [folder / f"{default.config_path}.yaml" for folder in folders]
        if default.package or not any(file.is_file() for file in files):  # a model's file, or a part of hydra
            continue
        file = next(file for file in files if file.is_file())
        content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
        layers.append(layer_of(file.name, content if isinstance(content, dict) else {}))
    given = [(override.key_or_group, override.value()) for override in found.config_overrides]
    return [*layers, command_line(given)]


def _leave_out_replaced(tree: DictConfig, layers: Sequence[ConfigLayer], quiet: bool) -> None:
    """Delete the values that the algorithm replaces from a composed tree, and print each."""
    from omegaconf import open_dict

    for lost in replaced(layers):
        with open_dict(tree):
            for spelling in (lost.key, lost.key.replace("_", "-")):
                tree[lost.section].pop(spelling, None)
        if lost.message and not quiet:
            logger.info(f"replaced {lost.message}")


def _settable(override: str) -> str:
    """Prefix an override so that hydra accepts keys that the YAML lacks. `resolve` refuses unknown keys later."""
    known = override.split(".")[0] in (*SECTIONS, "minimind") and "." in override.split("=")[0]
    return f"++{override}" if known else override


def command_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """Return a parser with hydra's flags. The remaining words of the command line are overrides."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", required=True, help="a YAML of configs/rlxf, or of --config-dir")
    parser.add_argument("--config-dir", "-cd", help="directory of the YAML files (default: the kit's configs/rlxf)")
    parser.add_argument("--device", help="file of device/ to merge (default: the file of the device found)")
    parser.add_argument("overrides", nargs="*", help="such as actor_config.lr=1e-6")
    return parser


def require_weights(load: str | Path | None) -> None:
    """Check that the initial weights exist.

    Raises:
        UserError: `load` of actor_config does not exist.
    """
    if not load or not Path(load).exists():
        raise UserError(f"actor_config.load: {load} does not exist; expected the initial weights")
