"""Train a model. Settings become the flags of model, recipe, parallel layout, data and logs.

Settings, from the environment:
  MODEL            a name of `minimind-mcore presets --list`, or an HF directory or config.json
                   (default: minimind3; for the sample data minimind3_tiny)
  RECIPE           a name of `minimind-mcore recipes --list` (default: by the generation of MODEL and the stage)
  DATA_PATH        prefix of a converted dataset, or raw files, directories or globs, which are converted once, or a
                   blend such as "0.3 one 0.7 two.jsonl" (default: sample data). Without weights, "one two.jsonl", each
                   set counts by its tokens
  TOKENIZER_PATH   directory with tokenizer.json
  TP PP VPP EP CP  parallel layout; VPP is the number of layers of a virtual pipeline stage (default: 1; TP=2 on a CPU
                   with an even number of processes)
  MBS GBS SEQ_LENGTH EPOCHS TRAIN_ITERS LR   override the recipe
  PRECISION        bf16, fp16, fp32 or auto (default: bf16, on a CPU fp32). auto is fp32 on a CPU without
                   AVX512-BF16 or AMX, else bf16
  PACK             1: several conversations share a sequence, without attention between them. Data that is already
                   converted must be packed (--pack --neat-pack)
  ROUTER_WEIGHT    normalized, softmax or straight_through: how a mixture of experts weighs its experts (default: the
                   rule of the loaded weights; for new training straight_through with one expert per token;
                   docs/models.md)
  CKPT_LOAD_DIR    initial weights (default: pretrain resumes from CKPT_SAVE_DIR; the other stages start from the
                   checkpoints of the stage before in outputs/MODEL)
  TEACHER          teacher model of distill: a Hugging Face directory or checkpoints
  OUTPUT_DIR       results (default: outputs/MODEL, after pretraining outputs/MODEL/STAGE)
  CKPT_SAVE_DIR    checkpoints (default: OUTPUT_DIR/checkpoints); the same command resumes from them
  LOG_DIR          train.log and TensorBoard events (default: OUTPUT_DIR/logs)
  DATA_DIR         converted data
  SAVE_INTERVAL LOG_INTERVAL EVAL_INTERVAL EVAL_ITERS SPLIT SEED CKPT_FORMAT   like the Megatron flags
  DEVICE BACKEND NPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT HOSTFILE   device and hosts
Further Megatron flags are passed on and override settings. To change the learning rate use LR: --min-lr of the recipe
follows LR. The recipe also sets LoRA's rank, alpha and targets (--lora-r, --lora-alpha, --lora-target-modules), and
DPO's beta and loss (--dpo-beta, --dpo-loss-type, --dpo-label-smoothing, --pref-ftx). --dry-run checks everything and
trains nothing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.cli import data
from minimind_mcore.cli.launcher import LaunchSettings, precision, read_settings, run_program
from minimind_mcore.cli.settings import choice, count, env, flags, given, help_of, path
from minimind_mcore.errors import UserError
from minimind_mcore.inputs.flags import refuse_unknown_training_flags
from minimind_mcore.models import presets, recipes
from minimind_mcore.paths import default_outputs

logger = logging.getLogger(__name__)


def pretrain(argv: Sequence[str]) -> None:
    """minimind-mcore pretrain [Megatron flags]: pretrain a model."""
    help_of(argv, f"{pretrain.__doc__}\n{__doc__}")
    run = Run("pretrain", argv)
    begin = ["--load", run.save]
    if load := path("CKPT_LOAD_DIR"):
        # A mistyped CKPT_LOAD_DIR would train from random weights.
        begin = ["--load", load, "--exit-on-missing-checkpoint"]
    run.train("pretrain_gpt.py", "text", begin)


def sft(argv: Sequence[str]) -> None:
    """minimind-mcore sft [Megatron flags]: fine-tune all weights on conversations."""
    run = begin("sft", argv)
    run.post_train("checkpoints", ["--stage", "sft", "--is-instruction-dataset", *run.packing()])


def lora(argv: Sequence[str]) -> None:
    """minimind-mcore lora [Megatron flags]: fine-tune LoRA adapters. Checkpoints hold only the adapters."""
    run = begin("lora", argv)
    run.post_train("sft/checkpoints", ["--stage", "sft", "--is-instruction-dataset", *run.packing()])


def reason(argv: Sequence[str]) -> None:
    """minimind-mcore reason [Megatron flags]: fine-tune on reasoning, as MiniMind2 does."""
    run = begin("reason", argv)
    run.post_train("dpo/checkpoints", ["--stage", "reason", *run.packing()])


def distill(argv: Sequence[str]) -> None:
    """minimind-mcore distill [Megatron flags]: fine-tune on conversations and the logits of TEACHER."""
    run = begin("distill", argv)
    if not (teacher := path("TEACHER")):
        raise UserError("TEACHER is not set: give the model to learn from, an HF directory or checkpoints")
    run.post_train("sft/checkpoints", ["--stage", "distill", "--teacher-model", teacher, *run.packing()])


def dpo(argv: Sequence[str]) -> None:
    """minimind-mcore dpo [Megatron flags]: align a model with preferences. The reference has the initial weights."""
    run = begin("dpo", argv)
    # The reference is given explicitly, because a resumed run would use its own trained weights. With LoRA the
    # reference is the base model, which needs no flag.
    own = given(argv, "--lora-target-modules") and not given(argv, "--reference-live")
    reference = [] if own else ["--ref-model", path("CKPT_LOAD_DIR", run.models / "sft/checkpoints")]
    run.post_train(
        "sft/checkpoints", ["--stage", "dpo", "--is-pairwise-dataset", "--no-pad-to-seq-lengths", *reference]
    )


def tune(argv: Sequence[str]) -> None:
    """minimind-mcore tune [Megatron flags]: sft, reason or distill, by the setting STAGE."""
    stages = {"sft": sft, "reason": reason, "distill": distill}
    stages[choice("STAGE", "sft", "sft", "reason", "distill")](argv)


def begin(stage: str, argv: Sequence[str]) -> Run:
    """Return the run of a post-training stage. With --help print the help and exit."""
    help_of(argv, f"{globals()[stage].__doc__}\n{__doc__}")
    run = Run(stage, argv)
    if run.launch.backend != "native" and stage in ("reason", "distill"):
        raise UserError(f"STAGE={stage}: MindSpeed-LLM has no such stage; use BACKEND=native")
    return run


class Run:
    """A training that the settings describe.

    Args:
        stage: "pretrain", "sft", "lora", "dpo", "reason" or "distill".
        argv: further Megatron flags, which override settings.

    Raises:
        UserError: a setting is wrong.
    """

    def __init__(self, stage: str, argv: Sequence[str]) -> None:
        self.stage, self.argv = stage, list(argv)
        self.launch: LaunchSettings = read_settings(argv)
        self.model = env("MODEL", "minimind3" if env("DATA_PATH") else "minimind3_tiny")
        self.pp, self.ep, self.cp = count("PP", 1), count("EP", 1), count("CP", 1)
        world, rest = self.launch.world, self.pp * self.cp
        # TP=2 on a CPU demonstrates tensor parallelism. The tiny models have only two key-value heads.
        two = self.launch.on_cpu and world % (2 * rest * self.ep) == 0
        self.tp = count("TP", 2 if two else 1)
        if world % (self.tp * rest):
            raise UserError(f"{world} processes cannot be split into TP={self.tp} x PP={self.pp} x CP={self.cp}")
        self.dp = world // (self.tp * rest)
        name = Path(self.model).name.removesuffix(".json")
        if name == "config":  # path/of/a/model/config.json
            name = Path(self.model).absolute().parent.name
        self.models = default_outputs() / "outputs" / name
        self.output = path("OUTPUT_DIR", self.models if stage == "pretrain" else self.models / stage)
        self.save = path("CKPT_SAVE_DIR", Path(self.output, "checkpoints"))
        self.precision = precision("fp32" if self.launch.on_cpu else "bf16")
        self.split = env("SPLIT", "99,1,0")

    def given(self, *names: str) -> bool:
        """Return whether the further flags contain one of these."""
        return given(self.argv, *names)

    def recipe(self, *more: str) -> list[str]:
        """Return the flags of the recipe."""
        sizes = flags("MBS --micro-batch-size", "GBS --global-batch-size", "SEQ_LENGTH", "EPOCHS", "LR")
        chosen = [*([name] if (name := env("RECIPE")) else []), "--model", self.model, "--stage", self.stage]
        # --split=VALUE as one word, because argparse would read a value that starts with "-" as a flag.
        return recipes.words([*chosen, "--data-parallel-size", str(self.dp), *sizes, f"--split={self.split}", *more])

    def train(self, program: str, kind: str, begin: Sequence[str]) -> None:
        """Run one of the kit's programs.

        Args:
            program: "pretrain_gpt.py" or "posttrain_gpt.py".
            kind: kind of data, "text", "sft" or "dpo".
            begin: flags of the stage and the initial weights.
        """
        refuse_unknown_training_flags(self.argv)  # before the data is converted, which can take hours
        model, recipe = presets.flags_of(self.model), self.recipe()
        # Conversion needs the sequence length: it counts longer conversations and packs up to this length.
        length = "" if self.given("--seq-length") else recipe[recipe.index("--seq-length") + 1]
        is_pending = self.given("--data-pending")  # a dry run of the whole pipeline gives the flag itself
        prefixes, tokenizer = (
            ([], path("TOKENIZER_PATH")) if is_pending else data.prepare(kind, (), self.launch.dry, length)
        )
        pending = ["--data-pending"] if self.launch.dry and not prefixes and not is_pending else []
        iterations = flags("TRAIN_ITERS") or ["--data", *prefixes][: 1 + len(prefixes) if prefixes else 0]
        recipe = self.recipe(*([] if self.given("--train-iters", "--train-samples") else iterations))
        fused = "--use-flash-attn --use-fused-rmsnorm --use-fused-swiglu --use-fused-rotary-pos-emb"
        words = [
            *model, *flags("ROUTER_WEIGHT"), *recipe, "--transformer-impl", "local", *fused.split(),
            "--seed", env("SEED", "42"), *self.parallel(), *(["--data-path", *prefixes] if prefixes else []),
            "--split", self.split, "--tokenizer-type", "PretrainedFromHF", "--tokenizer-name-or-path", tokenizer,
            *self.outputs(), *pending, *begin, *self.argv,
        ]  # fmt: skip
        run_program(self.launch, program, words)

    def post_train(self, default: str, begin: Sequence[str]) -> None:
        """Run posttrain_gpt.py with the initial weights of CKPT_LOAD_DIR (default: checkpoints of an earlier stage)."""
        start = ["--load", self.save, "--pretrained-checkpoint", path("CKPT_LOAD_DIR", self.models / default)]
        self.train("posttrain_gpt.py", "dpo" if self.stage == "dpo" else "sft", [*start, *begin])

    def parallel(self) -> list[str]:
        """Return the flags of parallel layout and precision."""
        words = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        words += flags("VPP --num-layers-per-virtual-pipeline-stage")
        words += ["--expert-model-parallel-size", str(self.ep), "--context-parallel-size", str(self.cp)]
        words += ["--sequence-parallel", "--use-distributed-optimizer"]
        chosen = "" if self.given("--bf16", "--fp16") or self.precision == "fp32" else f"--{self.precision}"
        words += [chosen] if chosen else []
        # Megatron starts at 2^32, which overflows. It halves the scale once per step and would skip about 16 steps.
        if (self.given("--fp16") or chosen == "--fp16") and not self.given("--initial-loss-scale", "--loss-scale"):
            words += ["--initial-loss-scale", "65536"]
        return words

    def outputs(self) -> list[str]:
        """Return the flags of checkpoints and logs."""
        logs = path("LOG_DIR", Path(self.output, "logs"))
        words = ["--save", self.save, "--tensorboard-dir", f"{logs}/tensorboard"]
        defaults = {"SAVE_INTERVAL": 1000, "LOG_INTERVAL": 10, "EVAL_INTERVAL": 100, "EVAL_ITERS": 5}
        for name, default in {**defaults, "CKPT_FORMAT": "torch"}.items():
            words += flags(name) or [f"--{name.lower().replace('_', '-')}", str(default)]
        if self.launch.backend == "native":
            words += ["--output-dir", self.output, "--log-file", f"{logs}/train.log"]
            # On a CPU loader processes would take cores from the training.
            words += ["--num-workers", "0"] if self.launch.on_cpu else []
        return words

    def packing(self) -> list[str]:
        """Return the flags for packed data (PACK=1), or for padding each micro-batch to its longest sample."""
        if env("PACK", "0") == "0":
            return ["--no-pad-to-seq-lengths"]
        if self.launch.backend != "native" and not env("MBS") and not self.given("--micro-batch-size"):
            os.environ["MBS"] = "1"
            logger.warning(
                "PACK=1: micro-batches of 1 (MBS=1), because in larger ones MindSpeed-LLM's packed samples attend to "
                "each other (D9). The global batch size is unchanged"
            )
        return ["--reset-attention-mask", "--neat-pack"]
