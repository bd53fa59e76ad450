"""The stages of a run: the inputs, commands and outputs of each.

A stage is a function that takes a `Run` and returns a list of jobs. `STAGES` is the table of all stages.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from minimind_mcore.cli.settings import env
from minimind_mcore.errors import UserError, did_you_mean
from minimind_mcore.models.presets import find_model, is_path
from minimind_mcore.models.recipes import RECIPES, get_recipe
from minimind_mcore.paths import PACKAGE
from minimind_mcore.pipeline import sample
from minimind_mcore.pipeline.job import EVALUATION, TRAINING, Command, Job, Records
from minimind_mcore.pipeline.tables import find, require_content, successor, tables
from minimind_mcore.preprocess.tokenize import tokenizer_fingerprint
from minimind_mcore.tools.cases import SETS

PRESETS = {
    "zero": "download tokenizer pretrain full_sft eval",
    "core": "download build pretrain full_sft eval",
    "all": "download build pretrain full_sft dpo reason eval",
    "rl": "ppo grpo spo",
    "serve": "convert vllm web",
}
# File names of each kind of data, old names last. The first existing file is used. If none exists, the first name is
# downloaded.
DATA = {
    "pretrain": ("pretrain_t2t_mini", "pretrain_t2t", "pretrain_hq"),
    "full_sft": ("sft_t2t_mini", "sft_t2t", "sft_mini_512", "sft_512", "sft_1024", "sft_2048"),
    "lora": ("lora_identity", "lora_medical"),
    "dpo": ("dpo",),
    "reason": ("r1_mix_1024",),
    "toolcall": ("sft_tool_call",),
    "rl": ("rlaif", "rlaif-mini"),
}
KIND = {"ppo": "rl", "grpo": "rl", "spo": "rl", "distillation": "full_sft", "tokenizer": "pretrain"}
# Each training stage: its command, and the stages that can provide its initial weights, in order of preference.
TRAININGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "pretrain": ("pretrain", ()),
    "full_sft": ("sft", ("pretrain",)),
    "lora": ("lora", ("full_sft",)),
    "dpo": ("dpo", ("full_sft",)),
    "reason": ("reason", ("dpo", "full_sft")),
    "toolcall": ("sft", ("full_sft",)),
    "distillation": ("distill", ("full_sft",)),
}
RL = {"ppo": ("reason", "full_sft"), "grpo": ("reason", "full_sft"), "spo": ("reason", "full_sft")}
# Training settings and the keys of reinforcement learning that they stand for; `ROLE_KEYS`: of each role's section.
RL_KEYS = {
    "GBS": "megatron_training.global_batch_size",
    "TRAIN_ITERS": "megatron_training.train_iters",
    "SEED": "megatron_training.seed",
}
ROLE_KEYS = {
    "MBS": "micro_batch_size",
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
}
RL_SETTINGS = (*RL_KEYS, *ROLE_KEYS, *"LR PROMPT_TYPE MAP_KEYS DEVICE BACKEND NPUS_PER_NODE NNODES".split())
BACKENDS = {"native": "embedded", "mindspeed-llm": "mindspeed-rl"}  # of pretraining, and of reinforcement learning
# Settings that belong to a single command. They are emptied so that the caller's environment cannot leak in.
UNSET = dict.fromkeys("CKPT_SAVE_DIR CKPT_LOAD_DIR LOG_DIR OUTPUT_PREFIX LOAD_DIR SAVE_DIR STAGE TEACHER".split(), "")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The options of a run.

    Attributes:
        model: a preset, or a directory or file with a config.json.
        recipe: model generation whose recipes are used, such as minimind2; "" uses the recipes of the model.
        output: output directory.
        data: directory of the data files.
        tokenizer: tokenizer directory given by the user, if any.
        sample: use the sample data and its settings.
        weight: stage whose weights are converted and served.
        teacher: teacher model for distillation.
        reward_model: directory of the reward model for reinforcement learning.
        port: port of the server.
        files: data files given by the user, by kind.
        stages: stages to run, in order.
        records: records of finished jobs.
        tasks: evaluation tasks in addition to the quality of replies. `task_data` has one path per task.
        mini: of the kinds of data that have a mini file, use only this file.
    """

    model: str
    recipe: str
    output: Path
    data: Path
    tokenizer: Path | None
    sample: bool
    weight: str
    teacher: str
    reward_model: str
    port: int
    stages: tuple[str, ...]
    records: Records
    files: Mapping[str, Path] = field(default_factory=dict)
    tasks: tuple[str, ...] = ()
    task_data: tuple[str, ...] = ()
    mini: bool = False

    def folder(self, stage: str) -> Path:
        """Return the directory of a stage."""
        return self.output / stage

    def checkpoints(self, stage: str) -> str:
        """Return the directory of a stage's checkpoints."""
        return str(self.folder(stage) / "checkpoints")

    def will_have(self, stage: str) -> bool:
        """Return whether a stage has finished or is part of this run."""
        return stage in self.stages or self.records.finished(stage)

    def before(self, stage: str) -> tuple[str, ...]:
        """Return the stages of this run that come before `stage`."""
        return self.stages[: self.stages.index(stage)]

    def begin(self, candidates: Sequence[str]) -> tuple[str, ...]:
        """Return the stage that provides the initial weights: the first available candidate, else the last one."""
        return tuple([name for name in candidates if self.will_have(name)][:1] or candidates[-1:])

    def tokenizer_dir(self) -> Path:
        """Return the tokenizer directory: given by the user, trained by this run, or downloaded."""
        if self.tokenizer:
            return self.tokenizer
        if self.sample:
            return self.data / "tokenizer"
        own = self.folder("tokenizer")
        return own if self.will_have("tokenizer") else self.downloaded_tokenizer()

    def downloaded_tokenizer(self) -> Path:
        """Return DATA_DIR/tokenizer, or DATA_DIR/tokenizer-NAME if the former is published for other models.

        Any tokenizer that is not published, such as one that the user has trained, is used for every model.
        """
        folder, name = self.data / "tokenizer", self.published_tokenizer()
        file = folder / "tokenizer.json"
        if not file.is_file():
            return folder
        require_content(file, "another tokenizer with TOKENIZER_PATH")
        found = _fingerprint(file, file.stat().st_mtime_ns)
        others = [entry["fingerprint"] for other, entry in tables()["tokenizer"].items() if other != name]
        return self.data / f"tokenizer-{name}" if found in others else folder

    def published_tokenizer(self) -> str:
        """Return the name of the published tokenizer of the model's generation."""
        return "minimind-3" if find_model(self.model).qk_layernorm else "minimind2"

    def tokenizer_files(self) -> dict[str, Path]:
        """Return the tokenizer files that are inputs of a job, with its config and chat template if they exist."""
        folder = self.tokenizer_dir()
        more = {name: folder / name for name in ("tokenizer_config.json", "chat_template.jinja")}
        return {"tokenizer": folder / "tokenizer.json"} | {name: file for name, file in more.items() if file.exists()}

    def model_file(self) -> dict[str, Path]:
        """Return the config.json of the model, if the model is not a preset."""
        path = Path(self.model)
        return {"model": path / "config.json" if path.is_dir() else path} if is_path(self.model) else {}

    def data_file(self, stage: str) -> Path:
        """Return the data file of a stage.

        Raises:
            UserError: a file given by the user does not exist, or the file has no data.
        """
        kind = KIND.get(stage, stage)
        if self.sample:
            return self.data / sample.FILES[kind]
        if given := self.files.get(kind):
            if not given.exists():
                raise UserError(f"--data {kind}={given}: the file does not exist{successor(given.stem)}")
            found = given
        else:
            paths = [self.data / f"{name}.jsonl" for name in self.data_names(kind)]
            found = next((path for path in paths if path.exists()), paths[0])
        require_content(found, f"another file with --data {kind}=FILE")
        return found

    def data_names(self, kind: str) -> tuple[str, ...]:
        """Return the file names of a kind of data that this run accepts, in order of preference."""
        names = DATA[kind]
        return names[:1] if self.mini and names[0].endswith("_mini") else names

    def recipe_of(self, command: str) -> str:
        """Return the recipe name of a training command, or "" for the default recipe of the model."""
        return recipe_of(self.model, self.recipe, command)


@functools.cache
def _fingerprint(file: Path, changed_ns: int) -> str:
    """Return the fingerprint of a tokenizer. The time of the file's last change keeps the cache correct."""
    return tokenizer_fingerprint(file)


def recipe_of(model: str, generation: str, command: str) -> str:
    """Return the recipe name of a training command, or "" for the default recipe of the model.

    Args:
        model: a preset or a path.
        generation: model generation whose recipes are used, such as "minimind2", or "".
        command: training command, such as "sft".
    """
    # Only MiniMind2 has a recipe for reasoning, so minimind-3 uses that one.
    if generation:
        return name if (name := f"{generation}_{command}") in RECIPES else f"minimind2_{command}"
    is_tiny = model.endswith("_tiny") and not is_path(model)
    return "minimind2_reason" if command == "reason" and not is_tiny else ""


def download(run: Run) -> list[Job]:
    """Download the data files and the tokenizer that the stages of a run need and that do not exist yet."""
    if run.sample:
        return [sample.data_job(run.data)]
    kinds = {stage: KIND.get(stage, stage) for stage in run.stages}
    needed = {run.data_file(stage): kind for stage, kind in kinds.items() if kind in DATA} or {
        run.data / f"{DATA[kind][0]}.jsonl": kind for kind in ("pretrain", "full_sft")
    }
    settings = {"DATA_DIR": str(run.data)}
    commands, outputs = [], []
    for path, kind in sorted(needed.items()):
        if path.exists():
            continue
        try:
            find("data", path.stem)
        except UserError as error:
            raise UserError(f"{error}; give this file or another one with --data {kind}=FILE") from error
        commands.append(Command(("download", "data", path.stem), settings))
        outputs.append(path)
    folder, name = run.tokenizer_dir(), run.published_tokenizer()
    usual = run.data / "tokenizer"
    if folder in (usual, run.data / f"tokenizer-{name}") and not (folder / "tokenizer.json").exists():
        where = () if folder == usual else ("--output", str(folder))
        commands.append(Command(("download", "tokenizer", name, *where), settings))
        outputs += [folder / file for file in find("tokenizer", name)["files"]]
    return [Job(name="download", commands=tuple(commands), outputs=tuple(outputs))] if commands else []


def tokenizer(run: Run) -> list[Job]:
    """Train a tokenizer on the pretraining data."""
    if run.sample:
        return []
    folder, text = run.folder("tokenizer"), run.data_file("tokenizer")
    command = Command(("tokenizer", "--input", str(text), "--output", str(folder)))
    return [
        Job(name="tokenizer", commands=(command,), inputs={"text": text}, folder=folder,
            outputs=(folder / "tokenizer.json",))
    ]  # fmt: skip


def training(stage: str) -> Callable[[Run], list[Job]]:
    """Return the stage function of a training."""

    def jobs(run: Run) -> list[Job]:
        command, candidates = TRAININGS[stage]
        if recipe := run.recipe_of(command):
            get_recipe(recipe)  # report a missing recipe before the first stage of the run
        begins, raw, folder = run.begin(candidates), run.data_file(stage), run.folder(stage)
        cache = run.data if os.access(run.data, os.W_OK) or not run.data.exists() else run.output
        settings = {
            **UNSET, "MODEL": run.model, "RECIPE": recipe, "DATA_PATH": str(raw),
            "TOKENIZER_PATH": str(run.tokenizer_dir()), "DATA_DIR": str(cache), "OUTPUT_DIR": str(folder),
            "CKPT_LOAD_DIR": run.checkpoints(begins[0]) if begins else "",
            # The commands' default on an Ascend host is MindSpeed-LLM, which has no stages reason and distill, saves no
            # checkpoint at a stop, and writes no metrics.jsonl for the report.
            "BACKEND": env("BACKEND", "native"),
        }  # fmt: skip
        inputs = {"data": raw, **run.tokenizer_files(), **run.model_file()}
        if command == "distill":
            teacher = run.teacher or (run.checkpoints("full_sft") if run.sample else "")
            if not teacher:
                raise UserError("distillation: --teacher is missing; give checkpoints or a Hugging Face directory")
            settings["TEACHER"] = teacher
            if run.teacher:
                inputs["teacher"] = Path(teacher)
        before: tuple[Command, ...] = ()
        words = [command]
        if run.sample:
            before, changes, flags = sample.training(run.data, stage)
            settings |= changes
            words += flags
        return [
            Job(name=stage, commands=(*before, Command(tuple(words), settings)), inputs=inputs, begins=begins,
                folder=folder, trains=True, settings=TRAINING)
        ]  # fmt: skip

    return jobs


def reinforcement(stage: str) -> Callable[[Run], list[Job]]:
    """Return the stage function of a reinforcement learning run."""

    def jobs(run: Run) -> list[Job]:
        folder = run.folder(stage)
        name = "ppo" if stage == "ppo" else "grpo"
        overrides = [f"minimind.output_dir={folder}", f"actor_config.save={folder}/checkpoints"]
        roles: Sequence[str] = ("actor", "critic") if stage == "ppo" else ("actor",)
        overrides += ["minimind.algorithm=spo"] if stage == "spo" else []
        overrides += [f"critic_config.save={folder}/critic"] if stage == "ppo" else []
        overrides += reinforcement_overrides(roles)
        backend = {"BACKEND": BACKENDS.get(os.environ.get("BACKEND", ""), os.environ.get("BACKEND", ""))}
        if run.sample and not run.will_have("full_sft"):  # alone, the command makes a model and problems of its own
            train = Command(("rl", "single", *overrides), {"CONFIG": f"{name}_minimind_tiny", **backend})
            return [Job(name=stage, commands=(train,), folder=folder, trains=True, settings=RL_SETTINGS)]
        if run.sample:
            tuned = run.folder(sample.MATH_SFT_STAGE)
            overrides += sample.problem_overrides(run.data, tuned, roles)
            train = Command(("rl", "single", *overrides), {"CONFIG": f"{name}_minimind_tiny", **backend})
            job = Job(name=stage, commands=(train,), inputs=run.tokenizer_files(), begins=("full_sft",), folder=folder,
                      trains=True, settings=RL_SETTINGS)  # fmt: skip
            return [sample.problems(run.data, run.checkpoints("full_sft"), tuned), job]
        if not run.reward_model:
            raise UserError(
                f"{stage}: --reward-model is missing; give the directory of internlm2-1_8b-reward "
                "(minimind-mcore download reward-model internlm2-1_8b-reward)"
            )
        begins, raw, tokenizer = run.begin(RL[stage]), run.data_file(stage), str(run.tokenizer_dir())
        prefix = str(run.output / "rlaif")
        convert = ("data", "minimind_rlaif", "--input", str(raw), "--output-prefix", prefix,
                   "--tokenizer-name-or-path", tokenizer)  # fmt: skip
        overrides += [
            f"megatron_training.data_path={prefix}",
            f"megatron_training.tokenizer_name_or_path={tokenizer}",
            "megatron_training.dataset_additional_keys=[]",
            "rl_config.verifier_function=[minimind_shape]",
            f"minimind.reward_model={run.reward_model}",
            "minimind.reward_model_trust_remote_code=true",
            f"model=[{run.model}]",
            f"megatron_training.model={run.model}",
        ]
        for role in roles:
            overrides += [f"{role}_config.model={run.model}", f"{role}_config.load={run.checkpoints(begins[0])}"]
        train = Command(("rl", "single", *overrides), {"CONFIG": f"{name}_minimind3", **backend})
        inputs = {"data": raw, **run.tokenizer_files(), **run.model_file(), "reward model": Path(run.reward_model)}
        commands = (Command(convert), train)
        return [
            Job(name=stage, commands=commands, inputs=inputs, begins=begins, folder=folder, trains=True,
                settings=RL_SETTINGS)
        ]  # fmt: skip

    return jobs


def reinforcement_overrides(roles: Sequence[str]) -> list[str]:
    """Return the overrides that the caller's training settings stand for.

    Raises:
        UserError: LR is not a number.
    """
    given = {name: os.environ[name] for name in TRAINING if os.environ.get(name)}
    overrides = [f"{key}={given[name]}" for name, key in RL_KEYS.items() if name in given]
    for role in roles:
        overrides += [f"{role}_config.{key}={given[name]}" for name, key in ROLE_KEYS.items() if name in given]
    if "LR" in given:
        try:
            lr = float(given["LR"])
        except ValueError as error:
            raise UserError(f"LR={given['LR']}: expected a number, as 1e-6") from error
        # The schedule ends at a tenth, as in the shipped configurations.
        overrides += [f"actor_config.lr={lr:g}", f"actor_config.min_lr={lr / 10:g}"]
    return overrides


def evaluate(run: Run) -> list[Job]:
    """Score the model of every finished stage, and let it answer fixed prompts."""
    before = run.before("eval")
    stages = [name for name in (*TRAININGS, *RL) if name in before or run.records.finished(name)] or [run.weight]
    return [_evaluation(run, stage) for stage in stages]


def _evaluation(run: Run, stage: str) -> Job:
    folder = run.output / "eval" / stage
    adapted = stage == "lora"
    model = {
        **UNSET, "LOAD_DIR": run.checkpoints("full_sft" if adapted else stage), "OUTPUT_DIR": str(folder),
        "LORA_DIR": run.checkpoints("lora") if adapted else "", "TOKENIZER_PATH": str(run.tokenizer_dir()),
    }  # fmt: skip
    raw = {"RAW": "1" if stage == "pretrain" else ""}
    prompts = PACKAGE / "pipeline" / ("sample_prompts.jsonl" if run.sample else "prompts.jsonl")
    answer = ["generate", "--prompt-file", str(prompts), "--output", str(folder / "replies.jsonl")]
    answer += ["--max-new-tokens", "32" if run.sample else "128"]
    inputs = {"prompts": prompts, **run.tokenizer_files()}
    if run.sample:
        questions = run.data / "questions.jsonl"
        inputs["questions"] = questions
        tasks, files = ["exact_match"], [str(questions)]
    else:
        tasks, files = ["quality", *run.tasks], [str(prompts), *run.task_data]
        pairs = zip(run.tasks, run.task_data, strict=False)
        inputs |= {
            f"task data {n}": Path(path) for n, (task, path) in enumerate(pairs, 1) if not names_cases(task, path)
        }
    begins = ("full_sft", "lora") if adapted else (stage,)
    # Passed as flags: TASK_DATA_PATH is split at white space, and `generate` uses TASK for the decoding mode.
    model |= {"TASK": "", "TASK_DATA_PATH": ""}
    score = ("evaluate", "--task", *tasks, "--task-data-path", *files)
    batch = {"BATCH": "100"} if run.sample else {}
    commands = (Command(score, {**model, **batch}), Command(tuple(answer), {**model, **raw}))
    return Job(
        name=f"eval-{stage}", commands=commands,
        inputs=inputs, begins=begins, folder=folder, outputs=(folder / "scores.json", folder / "replies.jsonl"),
        settings=EVALUATION,
    )  # fmt: skip


def names_cases(task: str, word: str) -> bool:
    """Return whether a word of TASK_DATA_PATH names built-in cases of tool calling, and not a file."""
    return task == "toolcall" and word in SETS


def convert(run: Run) -> list[Job]:
    """Convert the weights of the stage `--weight` to a Hugging Face directory."""
    folder = run.output / "hf"
    settings = {
        **UNSET, "LOAD_DIR": run.checkpoints(run.weight), "SAVE_DIR": str(folder),
        "TOKENIZER_PATH": str(run.tokenizer_dir()),
    }  # fmt: skip
    settings |= {name: os.environ.get(name, "") for name in ("FORMAT", "PAD_HEAD_DIM")}
    words: tuple[str, ...] = ("convert", "mcore2hf")
    if run.weight == "lora":
        words = ("convert", "mcore2hf_lora")
        settings |= {"LOAD_DIR": run.checkpoints("full_sft"), "LORA_DIR": run.checkpoints("lora")}
    begins = ("full_sft", "lora") if run.weight == "lora" else (run.weight,)
    return [
        Job(name="convert", commands=(Command(words, settings),), inputs=run.tokenizer_files(), begins=begins,
            folder=folder, outputs=(folder,), settings=("PRECISION", *(["MERGE"] if run.weight == "lora" else [])))
    ]  # fmt: skip


STAGES: dict[str, Callable[[Run], list[Job]]] = {
    "download": download,
    "build": lambda run: [],  # only --docker builds an image (docker.py)
    "tokenizer": tokenizer,
    **{stage: training(stage) for stage in ("pretrain", "full_sft", "lora", "dpo", "reason", "toolcall")},
    **{stage: reinforcement(stage) for stage in RL},
    "distillation": training("distillation"),
    "eval": evaluate,
    "convert": convert,
    "vllm": lambda run: [],  # serving.py starts the server, which outlives the run
    "web": lambda run: [],
}


def expand(words: Sequence[str]) -> list[str]:
    """Return the stages of a command line, with presets expanded and duplicates removed.

    Raises:
        UserError: a word is neither a stage nor a preset, or no word was given.
    """
    known = [*STAGES, *PRESETS]
    stages: list[str] = []
    for word in words:
        if word not in known:
            hint = did_you_mean(word, known)
            raise UserError(
                f"{word} is not a stage or preset{hint}; stages: {' '.join(STAGES)}; presets: {' '.join(PRESETS)}"
            )
        stages += [name for name in PRESETS.get(word, word).split() if name not in stages]
    if not stages:
        raise UserError(f"no stage was given; stages: {' '.join(STAGES)}; presets: {' '.join(PRESETS)}")
    return stages


def has_no_reasoning(run: Run) -> bool:
    """Return whether to skip the reason stage: the full_sft data of minimind-3 already contains reasoning."""
    return not run.sample and find_model(run.model).qk_layernorm and not run.data_file("reason").exists()


def addition_accuracy(run: Run, stage: str) -> float:
    """Return the accuracy on unseen sums of a stage's model in a sample run."""
    scores = json.loads((run.output / "eval" / stage / "scores.json").read_text(encoding="utf-8"))
    return float(scores["accuracy"]["exact_match"]["subjects"]["addition"]["accuracy"])
