"""What MindSpeed-LLM's programs did in a rehearsal, recorded, so that CI holds the native engine to it without them.

    export MINDSPEED_LLM_HOME=... MINDSPEED_HOME=... MEGATRON_HOME=...
    PYTHONPATH=tests:. .venv/bin/python -m helpers.golden    # record again

Each file of tests/contract/golden is one run from seed-made inputs: its flags (with {inputs} and {work} for the two
folders), losses, digests of its data files, names, types and shapes of its checkpoint, and the versions.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers import rehearsal
from helpers.engine import ROOT
from helpers.rehearsal import Inputs
from minimind_mcore.models.config import RouterWeight

FOLDER = ROOT / "tests/contract/golden"
POSTTRAIN = {"SEQ_LENGTH": "128", "LR": "1e-3"}


@dataclass(frozen=True)
class Case:
    """One run: a script, the model, the data, further settings."""

    script: str
    model: str
    data: str
    settings: dict[str, str] = field(default_factory=dict)
    router_weight: RouterWeight | None = None  # None: the model has no experts

    @property
    def posttrain(self) -> bool:
        """Whether posttrain_gpt.py runs it."""
        return not self.script.startswith("pretrain")


CASES = {
    "pretrain_minimind3": Case("pretrain_minimind_ptd.sh", "minimind3", "text.jsonl"),
    "pretrain_minimind3_moe": Case(
        "pretrain_minimind_ptd.sh", "minimind3_moe", "text.jsonl", router_weight="normalized"
    ),
    "pretrain_minimind3_moe_softmax": Case(
        "pretrain_minimind_ptd.sh", "minimind3_moe_softmax", "text.jsonl", router_weight="softmax"
    ),
    "pretrain_minimind3_moe_straight_through": Case(
        "pretrain_minimind_ptd.sh", "minimind3_moe_straight_through", "text.jsonl", router_weight="straight_through"
    ),
    "pretrain_minimind2": Case("pretrain_minimind_ptd.sh", "minimind2", "text.jsonl"),
    "pretrain_minimind2_moe": Case(
        "pretrain_minimind_ptd.sh", "minimind2_moe", "text.jsonl", router_weight="normalized"
    ),
    "sft_minimind3": Case("tune_minimind_full_ptd.sh", "minimind3", "chats.jsonl", POSTTRAIN),
    "dpo_minimind3": Case("dpo_minimind_ptd.sh", "minimind3", "pairs.jsonl", POSTTRAIN),
}


def prepare(inputs: Inputs, case: Case, work: Path, **environment: str) -> dict[str, str]:
    """Convert the weights to `work`/weights; the settings of the run itself."""
    settings = rehearsal.SETTINGS | inputs.environment | rehearsal.layout() | case.settings | environment
    model = {"LOAD_DIR": str(inputs.model(case.model)), "SAVE_DIR": str(work / "weights")}
    rehearsal.run_script("ckpt_convert_minimind_hf2mcore.sh", rehearse=False, **settings, **model)
    if case.router_weight:
        settings["ROUTER_WEIGHT"] = case.router_weight
    return settings | {
        "MODEL": str(inputs.model(case.model)),
        "DATA_PATH": str(inputs.folder / case.data),
        "CKPT_LOAD_DIR": str(work / "weights"),
        "OUTPUT_DIR": str(work / "run"),
    }


def digests(inputs: Inputs, prefix: str) -> dict[str, str]:
    """SHA-256 of a dataset's files, by their names without the prefix."""
    files = sorted(Path(prefix).parent.glob(Path(prefix).name + "*"))
    kept = [file for file in files if file.suffix in (".bin", ".idx")]
    assert kept, f"no dataset at {prefix}"
    return {
        file.name.removeprefix(Path(prefix).name): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept
    }  # fmt: skip


def table(checkpoints: Path) -> dict[str, str]:
    """The names of the model's tensors in the newest torch checkpoint, each with its type and shape (or "None")."""
    import torch

    file = sorted(checkpoints.glob("iter_*/mp_rank_00/model_optim_rng.pt"))[-1]
    model = torch.load(file, map_location="cpu", weights_only=False)["model"]
    return {
        name: f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)
        for name, value in sorted(model.items())
    }


def generic(words: list[str], inputs: Inputs, work: Path) -> list[str]:
    """Flags without the places of this machine."""
    return [word.replace(str(work), "{work}").replace(str(inputs.folder), "{inputs}") for word in words]


def special(words: list[str], inputs: Inputs, work: Path) -> list[str]:
    """The reverse of `generic`."""
    return [word.replace("{work}", str(work)).replace("{inputs}", str(inputs.folder)) for word in words]


def versions() -> dict[str, str]:
    """Of what ran: the sources by their commit or release, the libraries by their number."""
    code = "import torch, transformers, numpy; print(torch.__version__, transformers.__version__, numpy.__version__)"
    printed = subprocess.run(
        [str(rehearsal.PYTHON), "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    sources = {"MindSpeed-LLM": "v26.1.0", "MindSpeed": "26.1.0_core_r0.12.1", "Megatron-LM": "core_v0.12.1"}
    return sources | dict(zip(("torch", "transformers", "numpy"), printed, strict=True))


def record(name: str, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Rehearse a case and describe it."""
    case, work = CASES[name], folder / name
    result = rehearsal.run_script(case.script, **prepare(inputs, case, work))
    flags = rehearsal.program_flags(result)
    return {
        "versions": versions(),
        **({"router_weight": case.router_weight} if case.router_weight else {}),
        "flags": generic(flags, inputs, work),
        "losses": result.losses,
        "grad_norms": result.grad_norms,
        "operators": result.operators,
        "data": digests(inputs, rehearsal.value(flags, "--data-path")),
        "checkpoint": table(work / "run/checkpoints"),
    }


def main() -> None:
    """Record the cases that are named, or all."""
    if reason := rehearsal.missing():
        raise SystemExit(f"error: {reason}")
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        inputs = rehearsal.make_inputs(Path(folder) / "inputs")
        for name in sys.argv[1:] or CASES:
            print(f"{name} ...", flush=True)
            found = record(name, inputs, Path(folder))
            text = json.dumps(found, indent=1, ensure_ascii=False)
            (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")
            print(f"{name}: losses {found['losses']}", flush=True)


if __name__ == "__main__":
    main()
