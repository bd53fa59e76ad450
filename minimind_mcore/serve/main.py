"""minimind-mcore serve: answer OpenAI's HTTP requests with a model in any form.

minimind-mcore serve --load outputs/minimind3/sft/checkpoints
minimind-mcore serve --load out/full_sft_768.pth --tokenizer-name-or-path tokenizer --lora-load lora --port 8000
API_KEY=... minimind-mcore serve --load minimind-3 --host 0.0.0.0
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import sys
from collections.abc import Sequence

from minimind_mcore.checkpoint import assumptions
from minimind_mcore.errors import UserError
from minimind_mcore.inference import flags
from minimind_mcore.inference.loading import default_dtype, load_tokenizer, open_both
from minimind_mcore.inputs.flags import fields_from
from minimind_mcore.serve import engines
from minimind_mcore.serve.engines import ServerOptions

logger = logging.getLogger(__name__)

PROGRAM = "minimind-mcore serve"
SAMPLING = ("temperature", "top_p", "top_k")
USED = frozenset(("enable_thinking", *SAMPLING))


def main(argv: Sequence[str] | None = None) -> int:
    """The command `serve`; returns its exit status."""
    args = flags.parse(sys.argv[1:] if argv is None else argv, PROGRAM, USED)
    options = _options(args)
    source, info = open_both(flags.loading_job(args, default_dtype()), flags.tokenizer_flag(args))
    flags.check_model(args, source.config)
    # Paths, and `source.kind` has the directory's name, stay out of what a server prints.
    size, layers = source.config.num_parameters() / 1e6, source.config.num_layers
    logger.info(f"model      {size:.1f}M parameters in {layers} layers")
    for line in assumptions.described("model", source.assumptions):
        logger.info(line)
    if not options.raw and not load_tokenizer(info).chat_template:
        raise UserError("the tokenizer has no chat template; set RAW=1 (--raw) to serve /v1/completions alone")
    name, reason = engines.choose(args.engine, source)
    logger.info(f"engine     {name}: {reason}")
    if args.dry_run:
        print("a dry run: everything is valid, nothing was served", flush=True)
        return 0
    return int(engines.engine(name).run(source, info, options))


def _options(args: argparse.Namespace) -> ServerOptions:
    """The settings of the server.

    Raises:
        UserError: a port or an amount of memory is out of its range, or other hosts would be served without a key.
    """
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}: expected 0 to 65535; 0 takes a free port")
    if args.kv_cache_gib is not None and not args.kv_cache_gib > 0:
        raise UserError(f"--kv-cache-gib {args.kv_cache_gib}: expected more than 0")
    key = os.environ.get("API_KEY") or None
    if key is None and not args.allow_anonymous and not engines.is_loopback(args.host):
        raise UserError(
            f"--host {args.host} serves other hosts, and API_KEY is not set. Set API_KEY to the key that clients must "
            "send, or give --allow-anonymous to serve everybody"
        )
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError("API_KEY: expected ASCII characters without spaces, as a HTTP header carries it")
    given = [name for name in SAMPLING if f"--{name.replace('_', '-')}" in args.given]
    # MindSpeed-LLM's flags have the names of some fields too, so the changes come last.
    changes = {
        "name": args.served_model_name,
        "api_key": key,
        "thinking": args.enable_thinking,
        "max_batch_size": args.max_num_seqs,
        "defaults": tuple((name, getattr(args, name)) for name in given),
        "cors_origins": tuple(args.cors_origin),
    }
    return ServerOptions(**fields_from(ServerOptions, vars(args)) | changes)


def host_flag(setting: str) -> list[str]:
    """The flag of the setting HOST.

    conda's compilers set HOST to a platform, and tcsh to the name of the host: neither asks for a server that others
    reach.
    """
    try:
        if setting not in ("", "localhost"):
            ipaddress.ip_address(setting)
    except ValueError:
        logger.warning(f"HOST={setting} is not an IP address and is ignored; --host takes any name")
        return []
    return ["--host", setting] if setting else []
