"""One rank of a model: the actor, the reference or the critic.

This module uses megatron-core and not Ray: `workers/train.py` wraps it as an actor, tests use plain processes. The
methods are collective: every rank of the model calls them with the same arguments.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minimind_mcore import arguments
from minimind_mcore.checkpoint.files import directory_of, iterations_in, saved_args
from minimind_mcore.checkpoint.opening import open_source
from minimind_mcore.errors import UserError
from minimind_mcore.platform import device, ranks
from minimind_mcore.posttrain import lora
from minimind_mcore.rl.config.load import megatron_flags, require_weights
from minimind_mcore.rl.config.objective import objective, steps_ahead, updates_per_step
from minimind_mcore.rl.config.schema import Config, Section
from minimind_mcore.rl.runtime import weight_sync
from minimind_mcore.rl.runtime.batch import Batch
from minimind_mcore.rl.runtime.jobs import Actor, Critic, LogProbs, ResponseJob, Values, micro_batch
from minimind_mcore.rl.runtime.metrics import SAME_WEIGHTS
from minimind_mcore.rl.runtime.sharding import Budget, Division, MiniBatch, Shard, Share
from minimind_mcore.training import checkpoint_weights, checkpointing, data, distributed, step
from minimind_mcore.training.config import TrainConfig
from minimind_mcore.training.job import MicroBatch
from minimind_mcore.training.metrics import Progress
from minimind_mcore.training.model import build_chunks, build_model, weights_gathered
from minimind_mcore.training.optimizer import build_optimizer, learning_rate
from minimind_mcore.validation import validate

if TYPE_CHECKING:
    from megatron.core.transformer.module import MegatronModule

logger = logging.getLogger(__name__)

Role = Literal["actor", "reference", "critic"]


def command_line(config: Config, role: Role) -> argparse.Namespace:
    """Return the section of a role as arguments of the training package.

    The learning-rate schedule counts responses: a step of the run is `updates` updates with `mini_batch_size` each.

    Raises:
        UserError: a key asks for a feature that the native engine lacks.
    """
    section = section_of(config, role)
    args = arguments.parse(megatron_flags(section), posttrain=bool(section.lora_target_modules))
    if role != "actor":  # the reference is what the adapters of the actor begin with; a critic trains all its weights
        args.lora_target_modules = []
    if role == "reference":  # the reference is not trained
        args.lr, args.min_lr, args.lr_warmup_iters, args.lr_warmup_fraction = 0.0, 0.0, 0, None
        args.micro_batch_size, args.save = args.micro_batch_size or 1, None
    args.variable_seq_lengths, args.save_interval = True, None
    if role == "reference":
        args.global_batch_size = None  # `validate` then assumes one micro-batch per rank
        return args
    args.global_batch_size = config.rl.mini_batch_size
    args.updates_per_iteration = updates_per_step(config)
    args.train_iters *= args.updates_per_iteration
    args.keep_last = config.minimind.keep_last
    if role == "critic" and args.keep_last:
        # The critic is saved before the actor. If the run is killed between, the actor's last checkpoint keeps its
        # pair.
        args.keep_last += 1
    args.override_opt_param_scheduler = config.minimind.resume_schedule == "override"
    args.use_checkpoint_opt_param_scheduler = config.minimind.resume_schedule == "checkpoint"
    args.ckpt_format = "torch"  # the format of MindSpeed-RL and of this kit's scripts
    if role == "critic":
        args.untie_embeddings_and_output_weights = True
        if config.actor.save and args.save in (None, config.actor.save):  # the critic has no directory of its own
            args.save = str(Path(config.actor.save) / "critic")
    return args


def section_of(config: Config, role: Role) -> Section:
    """Return the section of the YAML for a role."""
    if role == "critic":
        return config.critic or config.actor
    return config.ref if role == "reference" else config.actor


class Rank:
    """This rank's shard of a model. RANK, WORLD_SIZE and the other variables of `torch.distributed` must be set.

    Args:
        config: configuration of the run.
        role: role of the model.
        reference: also keep the reference's weights, for `measure(reference=True)`.
    """

    def __init__(self, config: Config, role: Role, reference: bool = False) -> None:
        self.config, self.role = config, role
        args = command_line(config, role)
        self.layout = validate(args, distributed.world_size())
        device.setup()
        self.training = TrainConfig.from_args(args, self.layout)
        if self.training.model.lora_target_modules:
            self.training = lora.check(self.training)
        distributed.initialize(self.training)
        data.open_tokenizer(self.training)
        self.algorithm = objective(config)
        self.job: Any  # computes the loss; `ask` computes what `measure` returns
        self.ask: ResponseJob
        if role == "critic":
            self.job, self.ask = Critic(self.training, config.rl.cliprange_value), Values(self.training)
        else:
            self.job = Actor(self.training, config, self.algorithm)
            self.ask = LogProbs(self.training, self.job.temperature)
        self.model: list[MegatronModule] = []
        self.frozen: step.Engine  # the reference model
        self.engine: step.Engine
        self.progress = Progress()
        self.wants_reference = reference
        # If the engines may be steps ahead: trained weights by the step after which they were current.
        self.earlier: dict[int, list[Tensor]] = {}
        self.published: dict[str, weight_sync.WeightPart] = {}
        self.version, self.kept = 0, False  # see `publish`

    # ------------------------------------------------------------------------------------------ weights

    def load(self, at: int | None = None) -> dict[str, Any]:
        """Build the model and load its weights.

        A run resumes from the newest checkpoint of `save`. Without one it starts with the weights of `load`, or with
        random weights.

        Args:
            at: iteration of the checkpoint to resume from, 0 for none (default: the newest).

        Returns:
            `iteration` and `state` of the checkpoint, or 0 and None if there is none.

        Raises:
            UserError: there is no checkpoint of iteration `at`, or no readable one.
        """
        if self.role == "reference":
            self.frozen = self._frozen(resumed=bool(at))
            return {"iteration": 0, "state": None}
        save = self.training.checkpoint.save
        saved = iterations_in(Path(save)) if save else []
        if at and at not in saved:
            raise UserError(
                f"{save}: found no checkpoint of iteration {at}, from which the actor resumes (found "
                f"{', '.join(map(str, saved)) or 'none'}); restore it, or remove the actor's newer checkpoints"
            )
        resumed = at != 0 and bool(saved)
        begin = {"load": save, "ckpt_step": at} if resumed else {"ckpt_step": None}
        if not self.training.model.lora_target_modules:
            begin["pretrained_checkpoint"] = None
        self.training, _ = checkpointing.settle_router_weight(self.training, **begin)
        self.job.config = self.ask.config = self.training
        self.model = build_model(self.training, self.job)
        self.engine = step.Engine(self.training, self.model, *build_optimizer(self.training, self.model))
        if save:
            checkpointing.require_shared_directory(Path(save))
        state = None
        if resumed:
            state = self._resume(at)
        else:
            self._begin()
        if self.wants_reference:
            self.frozen = self._frozen(resumed=bool(self.progress.iteration))
        return {"iteration": self.progress.iteration, "state": state}

    def _resume(self, at: int | None) -> dict[str, Any] | None:
        # finetune, no_load_optim and no_load_rng of the YAML apply to the initial weights only, not to resuming.
        everything = {"finetune": False, "no_load_optim": False, "no_load_rng": False}
        changes = {"load": self.training.checkpoint.save, "ckpt_step": at, **everything}
        if not self.training.model.lora_target_modules:
            changes["pretrained_checkpoint"] = None
        self.progress = checkpointing.load(self.training.changed(**changes), self.engine, self.job.title)
        chosen = directory_of(self.training.checkpoint.directory, self.progress.iteration)
        saved = ranks.from_main(lambda: getattr(saved_args(chosen), "rl_state", None))
        return saved

    def _begin(self) -> None:
        self.progress = Progress()
        if not (begin := self.training.checkpoint.load):
            return  # of LoRA the base, which `Actor.prepare_model` has read
        if self.training.model.lora_target_modules:
            checkpointing.load(self.training.changed(finetune=True, ckpt_step=None), self.engine, self.job.title)
            return
        if self.role == "critic":
            self._load_trunk(Path(begin))
        else:
            self._load_weights(Path(begin), self.model, self.job.title)
        self.engine.take_weights()

    def _load_weights(self, path: Path, model: list[MegatronModule], role: str) -> None:
        require_weights(path)
        checkpointing.load_weights(self.training, path, model, role)

    def _load_trunk(self, path: Path) -> None:
        """Load the policy's weights into a critic, with a new value head."""
        from minimind_mcore.models.loading import load_into, whole_model_parameters
        from minimind_mcore.models.weights import OUTPUT

        found = open_source(path, stated={"num_heads": self.training.architecture.num_heads}).config
        # The critic's value head replaces the policy's output layer, whether or not that one is tied.
        untied = self.training.changed(untie_embeddings_and_output_weights=not found.tie_embeddings)
        source = checkpoint_weights.open_model(untied, path)
        own = {name: p.detach().clone() for name, p in whole_model_parameters(self.model) if name == OUTPUT}
        load_into(self.model, lambda name: own[name] if name in own else checkpoint_weights.read_tensor(source, name))
        logger.info(f"{self.job.title}: loaded weights of {path}, with a value head in place of the output layer")

    def _frozen(self, resumed: bool) -> step.Engine:
        """Return the reference model in this layout. It is not trained."""
        chunks = build_chunks(self.training, self.ask)
        path = self._reference_path(resumed)
        if path is not None:
            self._load_weights(path, chunks, "reference")
        else:
            logger.info("reference: random weights, because actor_config.load is not set")
        for chunk in chunks:
            chunk.requires_grad_(False)
        return step.Engine(self.training, chunks)

    def _reference_path(self, resumed: bool) -> Path | None:
        """Return the path of the reference's weights: the weights at the start of the run."""
        mode, files = self.config.rl.integrated_mode_config or {}, self.training.checkpoint
        apart, save = self.role == "reference", self.config.actor.save
        path = (None if apart else mode.get("ref_model_load_path")) or (
            files.pretrained_checkpoint if self.training.model.lora_target_modules else files.load
        )
        if path and resumed and save and Path(path).resolve() == Path(save).resolve():
            key = "ref_config.load" if apart else "rl_config.integrated_mode_config.ref_model_load_path"
            raise UserError(
                f"load and save are both {path}: the initial weights of the run, which are the reference model, are "
                f"unknown; set {key}"
            )
        return Path(path) if path else None

    def publish(self, keep: bool = False) -> weight_sync.WeightVersion:
        """Make the current weights available to `shards`. Collective.

        Args:
            keep: copy the weights, so that `shards` returns them during later updates too.
        """
        with weights_gathered(self.training, self.model):
            model = self.training.model
            own = weight_sync.parts(self.model, model.lora_alpha / model.lora_r if model.lora_target_modules else 1.0)
            self.published = {name: part.copied() for name, part in own.items()} if keep else own
        self.kept = keep
        self.version += 1
        size = max(tensor.element_size() for chunk in self.model for tensor in chunk.parameters())
        return weight_sync.WeightVersion(self.version, weight_sync.buckets(self.training.architecture, size))

    def shards(self, version: int, names: Collection[str] | None = None) -> list[weight_sync.WeightShard]:
        """Return this rank's shards of a version of the weights, for some tensor names (default: all)."""
        if version != self.version:
            raise RuntimeError(
                f"weight sync: weights {version} were asked for, but the ranks hold weights {self.version}"
            )
        return weight_sync.shards(self.published, names)

    def save(self, iteration: int, consumed: int, state: dict[str, Any]) -> None:
        """Write a checkpoint that `load` resumes from. `state` is the state of the driver."""
        self.progress = Progress(iteration, consumed, self.progress.skipped)
        self.training.record.rl_state = state
        checkpointing.save(self.training, self.progress, self.engine)

    # ------------------------------------------------------------------------------------------ computing

    def division(self) -> tuple[int, Division]:
        """This rank's place in data parallelism, and how batches are divided over it."""
        from megatron.core import parallel_state

        rl, layout, reference = self.config.rl, self.layout, self.role == "reference"
        wanted = rl.ref_forward_micro_batch_size if reference else rl.actor_forward_micro_batch_size
        forward: int | Budget = int(wanted or self.training.schedule.micro_batch_size)
        frozen = forward
        update: int | Budget = self.training.schedule.micro_batch_size
        if rl.use_dynamic_bsz:
            forward, frozen = self._budget("ref" if reference else "actor"), self._budget("ref")
            update = self._budget("update")
        together = layout.dp * (layout.pp if layout.vpp else 1)
        how = self.algorithm.aggregation if self.role == "actor" else "token-mean"
        found = Division(layout.dp, together, forward, frozen, update, how, self.training.data.seed)
        return int(parallel_state.get_data_parallel_rank()), found

    def _budget(self, phase: str) -> Budget:
        rl = self.config.rl
        return Budget(getattr(rl, f"{phase}_max_packing_token_size"), getattr(rl, f"{phase}_dynamic_max_batch_size"))

    def measure(self, shard: Shard, reference: bool = False) -> Share | None:
        """Log-probabilities and entropies of the responses, or a critic's values, of this rank's share of the rows.

        Returns:
            `logp` and `entropy`, or `values`. None on ranks whose result another rank returns.
        """
        engine = self.frozen if reference or self.role == "reference" else self.engine
        parts = [part for mini in shard.mini_batches for part in mini.micro_batches]
        micro = [shard.batch.select(torch.tensor(part)) for part in parts]
        [result] = engine.measure(self.ask, self._stream(micro, engine.model), len(micro))
        if not result.losses or self._is_copy():
            return None
        found = [part.unsqueeze(0) if self.role == "critic" else part for part in result.losses]
        width = shard.batch.width
        columns = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in found], dim=1).cpu()
        rows = [shard.rows[place] for part in parts for place in part]
        keep = [i for i, row in enumerate(rows) if row >= 0]
        names = ["values"] if self.role == "critic" else ["logp", "entropy"]
        return Share([rows[i] for i in keep], {n: c[keep] for n, c in zip(names, columns, strict=True)})

    def _stream(self, micro: list[Batch], model: list[MegatronModule]) -> step.Batches:
        """Return one iterator over the micro-batches per chunk of a model."""
        place = device.current().torch_device

        def stream() -> Iterator[MicroBatch]:
            for rows in micro:
                # The prompt ids are read on the CPU: reading them from the device would synchronize with it.
                yield micro_batch(rows.to(place), self.unit) | {"index": rows.prompt_ids.tolist()}

        return [stream() for _ in model]

    @property
    def unit(self) -> int:
        """The number that sequence lengths are padded to a multiple of."""
        return self.layout.tp if self.training.parallel.sequence_parallel else 1

    def _is_copy(self) -> bool:
        from megatron.core import parallel_state

        return int(parallel_state.get_tensor_model_parallel_rank()) != 0

    def update(self, shard: Shard, iteration: int, kl_coef: float | None = None) -> dict[str, float]:
        """Train on a shard: one optimizer step for each mini-batch.

        Args:
            shard: with advantages and, where there are several updates, `old_logp`.
            iteration: number of the step, for messages.
            kl_coef: of the reference's term, where it changes.

        Returns:
            Metrics, averaged over the updates. The same on every rank.

        Raises:
            UserError: a loss or the gradient norm is not finite.
        """
        if kl_coef is not None and isinstance(self.job, Actor):
            self.job.kl_coef = kl_coef
        apart = self._same_weights(shard, iteration) if self.role == "actor" and steps_ahead(self.config) else {}
        lr = learning_rate(self.engine.optimizer)
        self.version += not self.kept  # `shards` reads these very weights
        rows = [self._update_once(shard.batch, mini, iteration) for mini in shard.mini_batches]
        self.progress.skipped += sum(row.pop("skipped") for row in rows) > 0
        role = "critic" if self.role == "critic" else "actor"
        means = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
        return {**means, **apart, f"{role}/lr": lr}

    def _same_weights(self, shard: Shard, iteration: int) -> dict[str, float]:
        """Mean difference from the engine's log-probabilities, with the weights that generated the batch. Collective.

        Call it before an update: the present weights are kept for the next steps, whose responses they may generate.
        """
        if shard.weights is None or self.config.rl.partial_rollout_max_split > 1:  # parts have different weights
            return {}
        with weights_gathered(self.training, self.model):
            # Frozen weights, such as LoRA's base, are not copied.
            parameters = [p for chunk in self.model for p in chunk.parameters() if p.requires_grad]
            present = [parameter.detach().clone() for parameter in parameters]
        self.earlier[iteration - 1] = present
        self._put(parameters, self.earlier[shard.weights])
        total, tokens = self._difference(shard), sum(mini.tokens for mini in shard.mini_batches)
        self._put(parameters, present)
        oldest = iteration - steps_ahead(self.config)
        self.earlier = {step: values for step, values in self.earlier.items() if step >= oldest}
        return {SAME_WEIGHTS: total / float(tokens / self.config.rl.epochs)}

    @torch.no_grad()
    def _put(self, parameters: list[torch.nn.Parameter], values: list[Tensor]) -> None:
        with weights_gathered(self.training, self.model):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    def _difference(self, shard: Shard) -> float:
        """Sum over the tokens of all ranks of the difference from the engine's log-probabilities. Collective."""
        batch, total = shard.batch, torch.zeros((), device=device.current().torch_device)
        minis = shard.mini_batches[: len(shard.mini_batches) // self.config.rl.epochs]
        once = dataclasses.replace(shard, rows=list(range(len(batch))), mini_batches=minis)
        if share := self.measure(once):
            assert batch.rollout_logp is not None
            apart = (share.columns["logp"] - batch.rollout_logp[share.rows]).abs() * batch.mask[share.rows]
            total += apart.sum()
        torch.distributed.all_reduce(total)
        return float(total)

    def _update_once(self, batch: Batch, mini: MiniBatch, iteration: int) -> dict[str, float]:
        micro = [batch.select(torch.tensor(part)) for part in mini.micro_batches]
        self.job.total = mini.total
        if isinstance(self.job, Actor):
            self.job.tokens = mini.tokens
        self.job.micro_batches = len(micro)
        batches = self._stream(micro, self.model)
        result = self.engine.step(self.job, batches, len(micro), mini.rows, iteration)
        (_, *metrics), _ = step.averages(self.training, self.job, [result])
        role = "critic" if self.role == "critic" else "actor"
        named = dict(zip(self.job.metrics, metrics, strict=True))
        return {**named, f"{role}/grad_norm": result.grad_norm, "skipped": float(not result.updated)}
