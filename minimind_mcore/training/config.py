"""The settings of a training run: frozen, typed sections, built once from validated flags.

A field has the name of Megatron's argument, so one search finds both the flag and its uses. The functions of training/
and posttrain/ take a `TrainConfig`. `argparse.Namespace` is used only for parsing (`arguments.parse`,
`validation.validate`) and for the arguments in a checkpoint (`TrainConfig.saved_arguments`).
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from minimind_mcore.checkpoint.layout import ParallelLayout
from minimind_mcore.inputs.flags import fields_from
from minimind_mcore.models.config import ModelConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class ModelSection:
    """Settings of the model other than its architecture (`TrainConfig.architecture`)."""

    num_layers: int
    hidden_size: int
    padded_vocab_size: int
    num_experts: int | None
    moe_router_topk: int
    moe_z_loss_coeff: float | None
    transformer_impl: str
    attention_dropout: float
    hidden_dropout: float
    init_method_std: float
    minimind_init: str | None
    recompute_granularity: str | None
    recompute_method: str | None
    recompute_num_layers: int | None
    lora_target_modules: list[str]
    lora_r: int
    lora_alpha: int


@dataclass(frozen=True, kw_only=True)
class ParallelSection:
    """Parallelism and communication. `TrainConfig.layout` has the sizes."""

    data_parallel_size: int
    tensor_model_parallel_size: int
    sequence_parallel: bool
    use_distributed_optimizer: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    overlap_p2p_comm: bool
    ddp_bucket_size: int | None
    distributed_backend: str
    distributed_timeout_minutes: int


@dataclass(frozen=True, kw_only=True)
class OptimizerSection:
    """Settings of the optimizer."""

    optimizer: str
    lr: float
    min_lr: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float
    sgd_momentum: float
    clip_grad: float
    decay_all: bool
    calculate_per_token_loss: bool


@dataclass(frozen=True, kw_only=True)
class ScheduleSection:
    """The length of the run, with its learning rate and weight decay."""

    train_iters: int
    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int
    eval_iters: int
    eval_interval: int
    exit_interval: int | None
    exit_duration_in_mins: int | None
    lr_decay_style: str
    lr_decay_iters: int
    lr_warmup_iters: int
    lr_warmup_init: float
    lr_wsd_decay_style: str
    lr_wsd_decay_iters: int | None
    lr_at_iteration_end: bool
    start_weight_decay: float
    end_weight_decay: float
    weight_decay_incr_style: str
    override_opt_param_scheduler: bool
    use_checkpoint_opt_param_scheduler: bool
    updates_per_iteration: int = 1  # reinforcement learning makes several updates per iteration


@dataclass(frozen=True, kw_only=True)
class PrecisionSection:
    """Dtypes and the loss scale of fp16."""

    params_dtype: torch.dtype
    bf16: bool
    fp16: bool
    accumulate_allreduce_grads_in_fp32: bool
    loss_scale: float | None
    initial_loss_scale: float
    min_loss_scale: float
    loss_scale_window: float
    hysteresis: int
    deterministic_mode: bool


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """Datasets and batches."""

    seed: int
    seq_length: int
    split: str | None
    data_path: list[str] | None
    train_data_path: list[str] | None
    valid_data_path: list[str] | None
    test_data_path: list[str] | None
    data_cache_path: str | None
    data_pending: bool
    verify_data: bool
    num_workers: int
    num_dataset_builder_threads: int
    mmap_bin_files: bool
    reset_position_ids: bool
    reset_attention_mask: bool
    eod_mask_loss: bool
    tokenizer_name_or_path: str | None
    tokenizer_model: str | None
    variable_seq_lengths: bool
    no_pad_to_seq_lengths: bool
    pad_to_multiple_of: int
    neat_pack: bool
    no_shuffle: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointSection:
    """Paths and formats for loading and saving."""

    save: str | None
    save_interval: int | None
    keep_last: int | None
    ckpt_format: str
    no_save_optim: bool | None
    no_save_rng: bool | None
    load: str | None
    ckpt_step: int | None
    finetune: bool
    reshard: bool
    no_load_optim: bool | None
    no_load_rng: bool | None
    exit_on_missing_checkpoint: bool
    pretrained_checkpoint: str | None
    weights_pending: bool
    lora_load: str | None
    ref_model: str | None

    @property
    def directory(self) -> Path:
        """The directory of `--save`. Only for runs that save."""
        assert self.save
        return Path(self.save)

    @property
    def loads_optimizer(self) -> bool:
        """Whether the optimizer of a checkpoint is loaded, if the checkpoint has one."""
        return not (self.finetune or self.no_load_optim)


@dataclass(frozen=True, kw_only=True)
class Loggers:
    """Loggers besides metrics.jsonl. `swanlab` has further arguments of `swanlab.init`."""

    tensorboard_dir: str | None
    use_wandb: bool
    wandb_project: str
    wandb_exp_name: str
    wandb_save_dir: str
    swanlab_project: str
    swanlab: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoggingSection(Loggers):
    """Logging and profiling."""

    output_dir: str | None
    log_file: str | None
    log_interval: int
    log_num_zeros_in_grad: bool
    no_effect: list[str] = dataclasses.field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSection:
    """The losses of post-training."""

    dpo_loss_type: str = "sigmoid"
    dpo_beta: float = 0.1
    dpo_label_smoothing: float = 0.0
    pref_ftx: float = 0.0
    gamma_beta_ratio: float = 1.4
    reference_live: bool = False
    teacher_model: str | None = None
    distill_alpha: float = 0.5
    distill_temperature: float = 1.5


Section = TypeVar("Section")


def _section(kind: type[Section], flags: Mapping[str, object]) -> Section:
    """Build one section. A field without a flag in this program gets its default."""
    return kind(**fields_from(kind, flags))


class SampleOrder(TypedDict):
    """The settings other than flags that determine the order of a run's samples: a digest of each dataset, a digest of
    the order, and its length."""

    data: list[str]
    order: str
    samples: int


@dataclass(kw_only=True)
class RunRecord:
    """Facts that a run finds out after its start and stores in its checkpoints next to the flags.

    Attributes:
        tokenizer_fingerprint: fingerprint of the tokenizer.
        sample_order: sample order of the training set.
        lora_base: digest of the base weights of LoRA.
        rl_state: state of the driver of reinforcement learning.
    """

    tokenizer_fingerprint: str | None = None
    sample_order: SampleOrder | None = None
    lora_base: str | None = None
    rl_state: Mapping[str, object] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of one run.

    Attributes:
        layout: parallel layout of the ranks.
        architecture: architecture of the model, with the router weight of the loaded weights once they are opened.
        flags: all flags of Megatron and MindSpeed-LLM by name, as stored in checkpoints.
    """

    layout: ParallelLayout
    architecture: ModelConfig
    model: ModelSection
    parallel: ParallelSection
    optimizer: OptimizerSection
    schedule: ScheduleSection
    precision: PrecisionSection
    data: DataSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    objective: ObjectiveSection
    flags: Mapping[str, object]
    record: RunRecord = dataclasses.field(default_factory=RunRecord)

    @classmethod
    def from_args(cls, args: argparse.Namespace, layout: ParallelLayout) -> TrainConfig:
        """Build the sections from arguments that `validate` has checked and completed."""
        flags = dict(vars(args))
        return cls(
            layout=layout,
            architecture=ModelConfig.from_args(args),
            model=_section(ModelSection, flags),
            parallel=_section(ParallelSection, flags),
            optimizer=_section(OptimizerSection, flags),
            schedule=_section(ScheduleSection, flags),
            precision=_section(PrecisionSection, flags),
            data=_section(DataSection, flags),
            checkpoint=_section(CheckpointSection, flags),
            logging=_section(LoggingSection, flags),
            objective=_section(ObjectiveSection, flags),
            flags=flags,
        )

    def changed(self, **changes: object) -> TrainConfig:
        """Return a copy with other values of some flags, and the same record."""
        changed = TrainConfig.from_args(argparse.Namespace(**{**self.flags, **changes}), self.layout)
        return dataclasses.replace(changed, record=self.record)

    def saved_arguments(self, **more: object) -> argparse.Namespace:
        """Return the arguments for a checkpoint, under Megatron's names, so that MindSpeed-LLM can read them."""
        found = {name: value for name, value in vars(self.record).items() if value is not None}
        return argparse.Namespace(**{**self.flags, **found, **more})
