"""A run of reinforcement learning, described by MindSpeed-RL's YAML: read, merged, resolved.

    config = resolve(compose("grpo_minimind_tiny", ["actor_config.lr=1e-5"]))
    config.actor.seq_length, config.rl.clip_ratio, config.generate.sampling_config.temperature
    config.minimind.algorithm

    megatron_flags(config.actor)        # for minimind_mcore.arguments.parse

The sections mean what they mean in MindSpeed-RL (its cli/train_grpo.py and mindspeed_rl/config_cls): an actor's
keys are those of its model, then megatron_training, then actor_config; what is not given has MindSpeed-RL's
default. The section `minimind` is `schema.MiniMindConfig`.
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
from minimind_mcore.preprocess.check import datasets_at
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
    """Return the configuration that a composed YAML means.

    Raises:
        UserError: an unknown section or key, a value of the wrong type, a model that is not defined.
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
    """Return the tree as dicts and lists, `${...}` replaced by the values that they name."""
    if isinstance(tree, dict):
        return tree
    from omegaconf import OmegaConf

    container = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _merged(reader: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a class with the given values; `-` in a key is `_`, as in MindSpeed-RL."""
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
    """A model's keys, then megatron_training's, then the section's own; the precision is that of `minimind`."""
    given = {**tree["megatron_training"], **tree[section]}
    model = model_keys(tree, str(given["model"])) if "model" in given else {}
    merged = _merged("MegatronConfig", {**model, **given})
    merged["bf16"] = merged["bf16"] and minimind.precision == "bf16"
    if minimind.precision == "fp16":  # MindSpeed-RL has no such key
        merged["fp16"] = True
        if merged["initial_loss_scale"] == 2**32:  # its default overflows, and is halved once in a step
            merged["initial_loss_scale"] = 2**16
    merged["pad_to_multiple_of"] = merged["tensor_model_parallel_size"] * merged["context_parallel_size"]
    return Section(**merged)


# Megatron's flags

# Keys that this kit's trainer of reinforcement learning reads itself, or does anyway.
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
    """The section as a command line that `minimind_mcore.arguments.parse` accepts.

    As MindSpeed-RL does for MindSpeed-LLM's parser: a list becomes several words, True the flag alone, and
    None and False nothing. Left out are what the trainer of reinforcement learning reads itself, and what
    the native engine does not have if it stands at MindSpeed-RL's default.

    Raises:
        UserError: a key that is set to what the native engine does not have.
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
    """Return the keys of a section that ask for something which the native engine does not have."""
    table, found = flag_table(), set()
    for given, value in section.items():
        key = str(given).replace("-", "_")
        record = table.get("--" + key.replace("_", "-"))
        if key in OF_THE_TRAINER or key == "model" or value is None or value is False:
            continue
        if record is None or record["dest"] not in IMPLEMENTED | NO_EFFECT:
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
    """The YAML of that name with its groups, what its device differs in, and the overrides, which win.

    Values of `rl_config` that belong to another algorithm than the one that is set later are left out, and each is
    printed: see `objective`.

    Args:
        name: of a file in `directory`, with or without `.yaml`.
        overrides: hydra's: "rl_config.clip_ratio=0.1", "+rl_config.gamma=0.9".
        directory: of the YAML files (default: the kit's configs/rlxf).
        device: the file of `device/` to take, if it is there (default: the device found); "none": the values
            of the YAML itself, which are those of an Ascend 910B.
        beside: another directory with groups.
        quiet: do not print the keys that the algorithm replaces.

    Raises:
        UserError: no such file, or what hydra says of it.
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
    # The kit's models and devices serve other directories too.
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
    """The files that hydra merges, in its order, and the command line. Call it while hydra is initialized.

    hydra.compose returns the merged tree alone, so the files that its defaults list names are read once more.
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
    """Delete the values that the algorithm replaces from a composed tree, and print them."""
    from omegaconf import open_dict

    for lost in replaced(layers):
        with open_dict(tree):
            for spelling in (lost.key, lost.key.replace("_", "-")):
                tree[lost.section].pop(spelling, None)
        if lost.message and not quiet:
            logger.info(f"replaced {lost.message}")


def _settable(override: str) -> str:
    """`section.key=value` as hydra wants it whether the YAML has the key or not; `resolve` refuses unknown ones."""
    known = override.split(".")[0] in (*SECTIONS, "minimind") and "." in override.split("=")[0]
    return f"++{override}" if known else override


def command_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser with hydra's own flags; what is left over on the command line are overrides."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("--config-name", "-cn", required=True, help="a YAML of configs/rlxf, or of --config-dir")
    parser.add_argument("--config-dir", "-cd", help="directory of the YAML files (default: the kit's configs/rlxf)")
    parser.add_argument("--device", help="file of device/ to take (default: that of the device found)")
    parser.add_argument("overrides", nargs="*", help="such as actor_config.lr=1e-6")
    return parser


def require_weights(load: str | Path | None) -> None:
    """Refuse weights that are not there.

    Raises:
        UserError: `load` of actor_config names no file or directory.
    """
    if not load or not Path(load).exists():
        raise UserError(f"actor_config.load: {load} does not exist; expected the weights to begin with")
