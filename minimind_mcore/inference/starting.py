"""What inference.py and evaluation.py begin with: open what the flags name, check it, load it, say what it is."""

from __future__ import annotations

import argparse
import sys
import time

from minimind_mcore.checkpoint import assumptions
from minimind_mcore.checkpoint.source import Source
from minimind_mcore.inference import flags
from minimind_mcore.inference.loading import Loaded, default_dtype, load, open_both
from minimind_mcore.platform import cpu, device
from minimind_mcore.preprocess.tokenize import TokenizerInfo


def opened(args: argparse.Namespace) -> tuple[Source, TokenizerInfo]:
    """The model and the tokenizer that a command line names; no weights are read.

    Raises:
        UserError: see `open_both` and `flags.check_model`.
    """
    source, info = open_both(flags.loading_job(args, default_dtype()), flags.tokenizer_flag(args))
    flags.check_model(args, source.config)
    size = source.config.num_parameters() / 1e6
    print(f"model      {args.load}: {source.kind}, {size:.1f}M parameters", file=sys.stderr)
    for line in assumptions.described(args.load, source.assumptions):
        print(line, file=sys.stderr)
    print(f"tokenizer  {info.path} (fingerprint {info.fingerprint[:12]})", file=sys.stderr, flush=True)
    return source, info


def start(source: Source, info: TokenizerInfo) -> Loaded:
    """Load the model onto the device.

    Raises:
        UserError: see `load`.
    """
    if device.current().kind == "cpu":
        cpu.tune()
    began = time.perf_counter()
    loaded = load(source, info)
    seconds = time.perf_counter() - began
    print(f"loaded     {loaded.dtype} on {device.current().kind} in {seconds:.1f} s", file=sys.stderr, flush=True)
    return loaded
