"""The commands for a trained model: convert, generate, chat, evaluate, serve."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.cli.launcher import precision, run_here
from minimind_mcore.cli.settings import CLI, env, flags, given, help_of, path, path_flags, show, value_of
from minimind_mcore.errors import UserError
from minimind_mcore.paths import default_outputs

# direction: (format that is read, format that is written)
CONVERSIONS = {
    "hf2mcore": ("hf", "mg"),
    "mcore2hf": ("mg", "hf"),
    "mcore2hf_lora": ("mg", "hf"),
    "mcore2mcore": ("mg", "mg"),
}
SAMPLING = ("MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "SEED")


def name_of(model: str) -> str:
    """Return the name of a model from its path: MODEL for MODEL.pth, hf/MODEL and outputs/MODEL/checkpoints."""
    file = Path(model)
    name = file.name.removesuffix(".pth")
    return file.parent.name if name == "checkpoints" else name


def directory_name(served: str) -> str:
    """Return a directory name for the model of a server: jingyaogong-minimind-3 for jingyaogong/minimind-3.

    Every other character than letters, digits, "_", "." and "-" becomes "-". Return "" for "".
    """
    return re.sub(r"[^\w.-]+", "-", served).strip(".-") or ("api" if served else "")


def outputs(*parts: str) -> Path:
    """Return a path in outputs/."""
    return default_outputs().joinpath("outputs", *parts)


def dtype() -> list[str]:
    """Return the flag for PRECISION, or no flag if PRECISION is not set."""
    return ["--params-dtype", precision("")] if env("PRECISION") else []


def convert(argv: Sequence[str]) -> None:
    """minimind-mcore convert [hf2mcore|mcore2hf|mcore2hf_lora|mcore2mcore] [flags]: convert weights.

    With a direction, these environment variables are settings:
      LOAD_DIR        model to convert. hf2mcore reads a Hugging Face directory (MiniMind's own form, Llama, Qwen3,
                      Qwen3-MoE, Qwen2-MoE) or a .pth; the others read a Megatron checkpoint in any layout and format
      SAVE_DIR        output directory (default: a directory in outputs/); mcore2hf also writes a file ending in .pth
      MODEL_TYPE_HF   check the model against a name: minimind3, minimind2_moe, qwen3, qwen3-moe, qwen2-moe, llama2, ...
      HF_CFG_DIR      directory with config.json and tokenizer, if the source has none
      TOKENIZER_PATH  tokenizer directory, which is copied to the output
      PRECISION       fp32, bf16 or fp16 (default: the dtype of the source)
      VERIFY          logits: also run both models and compare their logits
    Settings for a Megatron checkpoint as output:
      TP PP EP        parallel layout (default: 1)
      VPP             layers of a virtual pipeline stage
      NUM_LAYER_LIST  layers of each pipeline stage, such as 3,5
      NOOP_LAYERS     positions in the pipeline without a layer, such as 7
      CKPT_FORMAT     torch (default; the format of MindSpeed-LLM) or torch_dist
    Settings of mcore2hf:
      FORMAT          hf (default; loads with plain transformers) or minimind
      PAD_HEAD_DIM    128: pad the attention heads with zeros, for vLLM on an NPU (docs/vllm.md)
    Settings of mcore2hf_lora:
      LORA_DIR        adapters, if they are not in LOAD_DIR: a Megatron checkpoint, or MiniMind's LoRA .pth
      LORA_R LORA_ALPHA   as in training; compared with the checkpoint, and needed if it does not store them
      MERGE           1 (default): merge the adapters into the base; 0: write a PEFT adapter
    The flags are those of convert_ckpt_v2.py (`minimind-mcore convert_ckpt_v2.py --help`) and override settings.
    Without a direction only flags are read. --dry-run checks everything and writes nothing.
    """
    help_of(argv, convert.__doc__)
    if not argv or argv[0] not in CONVERSIONS:
        run_here("convert_ckpt_v2.py", argv)
    direction, *rest = argv
    if not (load := path("LOAD_DIR")):
        raise UserError("LOAD_DIR is not set: give the model to convert")
    source, target = CONVERSIONS[direction]
    words, suffix = [], "-hf"
    if target == "mg":
        suffix = f"-mcore-tp{env('TP', '1')}-pp{env('PP', '1')}" + (f"-ep{ep}" if (ep := env("EP", "1")) != "1" else "")
        for name, kind in {"TP": "tensor", "PP": "pipeline", "EP": "expert"}.items():
            words += [f"--target-{kind}-parallel-size", env(name, "1")]
        words += flags("VPP --num-layers-per-virtual-pipeline-stage", "NUM_LAYER_LIST", "NOOP_LAYERS", "CKPT_FORMAT")
    elif direction == "mcore2hf":
        words += flags("FORMAT", "PAD_HEAD_DIM")
    else:
        words += [*path_flags("LORA_DIR --lora-load"), *flags("LORA_R", "LORA_ALPHA")]
        if env("MERGE", "1") == "0":
            suffix = "-peft"
            words.append("--save-lora-to-hf")
    save = path("SAVE_DIR", outputs(name_of(load) + suffix))
    words = [
        "--load-model-type", source, "--save-model-type", target, "--load-dir", load, "--save-dir", save,
        *flags("MODEL_TYPE_HF", "HF_CFG_DIR", "TOKENIZER_PATH --tokenizer-name-or-path"), *dtype(),
        *flags("VERIFY"), *words, *rest,
    ]  # fmt: skip
    show([*CLI, "convert_ckpt_v2.py", *words])
    run_here("convert_ckpt_v2.py", words)


def generate(argv: Sequence[str]) -> None:
    """minimind-mcore generate [flags]: complete prompts.

    Prompts come from --prompt TEXT (repeatable), --prompt-file FILE, or standard input, one per line. Settings:
      LOAD_DIR        model in any format: a Megatron checkpoint, a Hugging Face directory or a .pth
      TOKENIZER_PATH  tokenizer directory (default: the tokenizer that the model names or contains)
      HF_CFG_DIR      directory with config.json, if the model has none
      LORA_DIR        adapters to merge; LORA_ALPHA if they do not store it
      PRECISION       bf16, fp16 or fp32 (default: fp32 on a CPU, else the dtype of the model)
      TASK            greedy (default), do_sample, beam_search, beam_search_with_sampling; several run in turn
      RAW             1: BOS and the prompt without a chat template, for a base model
      PROMPT_TYPE     a template of preprocessing, instead of the chat template of the tokenizer
      MAX_NEW_TOKENS TEMPERATURE TOP_K TOP_P SEED   like the flags with these names
    The flags are those of inference.py (`minimind-mcore inference.py --help`) and override settings. --dry-run checks
    everything and generates nothing.
    """
    help_of(argv, generate.__doc__)
    template = flags("PROMPT_TYPE") or ["--hf-chat-template"]
    template = ["--raw"] if env("RAW", "0") != "0" else template
    words = [*loaded(argv), "--task", *env("TASK", "greedy").split(), *template, *flags(*SAMPLING)]
    run_here("inference.py", [*words, *argv], "--dry-run" in argv)


def chat(argv: Sequence[str]) -> None:
    """minimind-mcore chat [flags]: talk to a model in a terminal, or line by line through a pipe.

    In the chat, /new starts a new conversation and /quit ends the program. Settings: those of `generate` except TASK,
    and
      SYSTEM          system prompt
      TOOLS           builtin, names of built-in tools separated by commas, or a JSON file (docs/tools.md)
      THINKING        true or false (default: the choice of the chat template)
      HISTORY_TURNS   earlier questions that the model sees (default: 3)
    The flags are those of inference.py (`minimind-mcore inference.py --help`) and override settings. --dry-run checks
    everything and starts no chat.
    """
    help_of(argv, chat.__doc__)
    words = [*loaded(argv), "--task", "chat", "--history-turns", env("HISTORY_TURNS", "3")]
    words += [*flags("PROMPT_TYPE", "SYSTEM", "THINKING --enable-thinking"), *_tools_flag()]
    words += [*(["--raw"] if env("RAW", "0") != "0" else []), *flags(*SAMPLING)]
    run_here("inference.py", [*words, *argv], "--dry-run" in argv)


def _tools_flag() -> list[str]:
    """Return the flag for TOOLS: a .json file as an absolute path, or names of built-in tools."""
    return path_flags("TOOLS") if Path(env("TOOLS")).suffix == ".json" else flags("TOOLS")


def evaluate(argv: Sequence[str]) -> None:
    """minimind-mcore evaluate [flags]: score a model.

    Settings:
      LOAD_DIR        model in any format: a Megatron checkpoint, a Hugging Face directory or a .pth
      TOKENIZER_PATH  tokenizer directory (default: the tokenizer that the model names or contains)
      HF_CFG_DIR      directory with config.json, if the model has none
      LORA_DIR        adapters to merge; LORA_ALPHA if they do not store it
      PRECISION       bf16, fp16 or fp32 (default: fp32 on a CPU, else the dtype of the model)
      TASK            ceval, cmmlu, mmlu, openbookqa, exact_match, toolcall, quality, perplexity; several run in turn
      TASK_DATA_PATH  one path per task: for a benchmark its published folder; for exact_match a .jsonl of questions
                      with answers; for toolcall minimind, minimind-ascend, generated or a .jsonl of cases; for quality
                      a file of prompts; for perplexity a .jsonl, .txt or .parquet, or the prefix of a dataset. For
                      paths with white space use --task-data-path
      NUM_FEWSHOT     solved questions before each question (default: 0)
      BATCH           batch size (default: 16)
      MAX_NEW_TOKENS  tokens of a reply for toolcall and quality (default: 256)
      HARNESS         tasks of lm-evaluation-harness, if it is installed
      OUTPUT_DIR      directory of scores.json and scores.png (default: outputs/NAME/evaluation)
    To score the tool calls of a server, set BACKEND=api, API_BASE_URL, API_KEY and API_MODEL instead of LOAD_DIR.
    NAME is then API_MODEL, with "-" for characters such as "/" and ":".
    The flags are those of evaluation.py (`minimind-mcore evaluation.py --help`) and override settings. --dry-run checks
    everything and scores nothing.
    """
    help_of(argv, evaluate.__doc__)
    api = (value_of(argv, "--backend") or env("BACKEND")) == "api"
    words = flags("BACKEND", "API_BASE_URL", "API_MODEL") if api else loaded(argv)
    for name, flag in {"TASK": "--task", "TASK_DATA_PATH": "--task-data-path", "HARNESS": "--harness"}.items():
        words += [flag, *listed] if (listed := env(name).split()) else []
    words += flags("NUM_FEWSHOT", "BATCH --evaluation-batch-size", "MAX_NEW_TOKENS")
    served = directory_name(value_of(argv, "--api-model") or env("API_MODEL"))
    name = served if api else name_of(path("LOAD_DIR"))
    if name or env("OUTPUT_DIR"):
        words += ["--output-dir", path("OUTPUT_DIR", outputs(name, "evaluation"))]
    run_here("evaluation.py", [*words, *argv], "--dry-run" in argv)


def serve(argv: Sequence[str]) -> int:
    """Serve the model of LOAD_DIR. Settings: those of `loaded`, and ENGINE, HOST, PORT, RAW, TEMPERATURE, TOP_K, TOP_P.

    Raises:
        UserError: no model is given, or PROMPT_TYPE is set.
    """
    from minimind_mcore.serve import main

    if given(argv, "-h", "--help"):
        return main.main(argv)
    if template := env("PROMPT_TYPE"):
        raise UserError(
            f"PROMPT_TYPE={template}: a server uses the tokenizer's own chat template; unset it, and put the template "
            "that you want into the tokenizer's chat_template"
        )
    raw = ["--raw"] if env("RAW", "0") != "0" else []
    words = [*loaded(argv), *flags("TEMPERATURE", "TOP_K", "TOP_P", "ENGINE", "PORT"), *raw]
    words += [*main.host_flag(env("HOST")), *argv]
    if "--dry-run" in argv:
        show([*CLI, "serve", *words])
    return main.main(words)


def loaded(argv: Sequence[str]) -> list[str]:
    """Return the flags for the model: LOAD_DIR, TOKENIZER_PATH, HF_CFG_DIR, LORA_DIR, LORA_ALPHA and PRECISION.

    Raises:
        UserError: no model is given.
    """
    if not env("LOAD_DIR") and not given(argv, "--load"):
        raise UserError(
            "LOAD_DIR is not set: give the model, a Megatron checkpoint, a Hugging Face directory or a .pth"
        )
    paths = ("LOAD_DIR --load", "TOKENIZER_PATH --tokenizer-name-or-path", "HF_CFG_DIR", "LORA_DIR --lora-load")
    return [*path_flags(*paths), *flags("LORA_ALPHA"), *dtype()]
