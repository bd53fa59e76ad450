"""Commands on a finished model: convert, generate, chat, evaluate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minimind_mcore.cli.place import run_here
from minimind_mcore.cli.settings import CLI, env, flags, given, help_of, path, path_flags, show
from minimind_mcore.errors import UserError
from minimind_mcore.paths import default_outputs

# conversion: what it reads, what it writes
CONVERSIONS = {
    "hf2mcore": ("hf", "mg"),
    "mcore2hf": ("mg", "hf"),
    "mcore2hf_lora": ("mg", "hf"),
    "mcore2mcore": ("mg", "mg"),
}
SAMPLING = ("MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "SEED")


def name_of(model: str) -> str:
    """Return the name of a model's directory or file: MODEL, also of outputs/MODEL/checkpoints."""
    file = Path(model)
    name = file.name.removesuffix(".pth")
    return file.parent.name if name == "checkpoints" else name


def outputs(*parts: str) -> Path:
    """Return a path in outputs/."""
    return default_outputs().joinpath("outputs", *parts)


def convert(argv: Sequence[str]) -> None:
    """minimind-mcore convert [hf2mcore|mcore2hf|mcore2hf_lora|mcore2mcore] [flags]: convert weights.

    With a direction the settings are the environment's:
      LOAD_DIR SAVE_DIR   the model to convert; where to write (default: a directory of outputs/)
      TP PP EP VPP NUM_LAYER_LIST NOOP_LAYERS CKPT_FORMAT   of a Megatron checkpoint that is written
      FORMAT PAD_HEAD_DIM   of mcore2hf
      LORA_DIR LORA_R LORA_ALPHA MERGE   of mcore2hf_lora; MERGE=0 writes a PEFT adapter
      MODEL_TYPE_HF HF_CFG_DIR TOKENIZER_PATH PRECISION VERIFY   as the flags
    The flags are those of convert_ckpt_v2.py (`minimind-mcore convert_ckpt_v2.py --help`) and win. Without a direction
    there are only flags.
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
        *flags("MODEL_TYPE_HF", "HF_CFG_DIR", "TOKENIZER_PATH --tokenizer-name-or-path", "PRECISION --params-dtype"),
        *flags("VERIFY"), *words, *rest,
    ]  # fmt: skip
    show([*CLI, "convert_ckpt_v2.py", *words])
    run_here("convert_ckpt_v2.py", words)


def generate(argv: Sequence[str]) -> None:
    """minimind-mcore generate [flags]: complete prompts.

    Settings: LOAD_DIR (the model), TOKENIZER_PATH, HF_CFG_DIR, LORA_DIR, LORA_ALPHA, PRECISION, TASK (greedy,
    do_sample, beam_search, beam_search_with_sampling), RAW=1 (no chat template), PROMPT_TYPE, MAX_NEW_TOKENS,
    TEMPERATURE, TOP_K, TOP_P, SEED. The flags are those of inference.py (`minimind-mcore inference.py --help`) and win.
    """
    help_of(argv, generate.__doc__)
    template = flags("PROMPT_TYPE") or ["--hf-chat-template"]
    template = ["--raw"] if env("RAW", "0") != "0" else template
    words = [*loaded(argv), "--task", *env("TASK", "greedy").split(), *template, *flags(*SAMPLING)]
    run_here("inference.py", [*words, *argv], "--dry-run" in argv)


def chat(argv: Sequence[str]) -> None:
    """minimind-mcore chat [flags]: talk to a model, on a terminal or line by line through a pipe.

    Settings: those of `generate` without TASK, and SYSTEM, TOOLS, THINKING, HISTORY_TURNS. The flags are those of
    inference.py (`minimind-mcore inference.py --help`) and win.
    """
    help_of(argv, chat.__doc__)
    words = [*loaded(argv), "--task", "chat", "--history-turns", env("HISTORY_TURNS", "3")]
    words += [*flags("PROMPT_TYPE", "SYSTEM", "THINKING --enable-thinking"), *_tools_flag()]
    words += [*(["--raw"] if env("RAW", "0") != "0" else []), *flags(*SAMPLING)]
    run_here("inference.py", [*words, *argv], "--dry-run" in argv)


def _tools_flag() -> list[str]:
    """Return the flag of TOOLS: a file as an absolute path, or names of built-in tools."""
    return path_flags("TOOLS") if Path(env("TOOLS")).suffix == ".json" else flags("TOOLS")


def evaluate(argv: Sequence[str]) -> None:
    """minimind-mcore evaluate [flags]: score a model.

    Settings: LOAD_DIR (the model), TOKENIZER_PATH, HF_CFG_DIR, LORA_DIR, LORA_ALPHA, PRECISION, TASK, TASK_DATA_PATH,
    NUM_FEWSHOT, BATCH, MAX_NEW_TOKENS, HARNESS, OUTPUT_DIR; of a server BACKEND=api, API_BASE_URL, API_KEY and
    API_MODEL in place of the model. The flags are those of evaluation.py
    (`minimind-mcore evaluation.py --help`) and win.
    """
    help_of(argv, evaluate.__doc__)
    api = env("BACKEND") == "api" or given(argv, "--backend")
    words = flags("BACKEND", "API_BASE_URL", "API_MODEL") if api else loaded(argv)
    for name, flag in {"TASK": "--task", "TASK_DATA_PATH": "--task-data-path", "HARNESS": "--harness"}.items():
        words += [flag, *listed] if (listed := env(name).split()) else []
    words += flags("NUM_FEWSHOT", "BATCH --evaluation-batch-size", "MAX_NEW_TOKENS")
    if env("LOAD_DIR") or env("OUTPUT_DIR"):
        words += ["--output-dir", path("OUTPUT_DIR", outputs(name_of(path("LOAD_DIR")), "evaluation"))]
    run_here("evaluation.py", [*words, *argv], "--dry-run" in argv)


def serve(argv: Sequence[str]) -> int:
    """Serve a model, by the settings LOAD_DIR, TOKENIZER_PATH, ..., ENGINE, HOST, PORT, RAW and the flags.

    Raises:
        UserError: no model is named, or PROMPT_TYPE asks for a template of MindSpeed-LLM's.
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
    """Return the flags of what is loaded.

    Raises:
        UserError: no model is named.
    """
    if not env("LOAD_DIR") and not given(argv, "--load"):
        raise UserError(
            "LOAD_DIR is not set: give the model, a Megatron checkpoint, a Hugging Face directory or a .pth"
        )
    paths = ("LOAD_DIR --load", "TOKENIZER_PATH --tokenizer-name-or-path", "HF_CFG_DIR", "LORA_DIR --lora-load")
    return [*path_flags(*paths), *flags("LORA_ALPHA", "PRECISION --params-dtype")]
