"""Weights from any MiniMind format to any other.

One idea carries it. The whole megatron-core model, as `models/weights.py` names it, is what every format
is read as and written from, and a tensor of it is `Lazy`: shape and dtype are known, bytes are read when
asked for. So a `Source` is a table of lazy tensors over memory-mapped files, a `Target` a set of files whose
every byte has its place before the first is written, and a conversion (`convert.py`) one pass that reads
each tensor once and hands it to the target. Reading back what was written is the same code again.

    convert.py     the conversion, top to bottom, and the `Target` that it writes to
    hf.py          writes directories of transformers and `.pth` files; megatron.py and peft.py write theirs
    job.py         a conversion as the command lines ask for it
    cli.py         the command lines of convert_ckpt_v2.py and convert_ckpt.py

`minimind_mcore/checkpoint/` reads the formats.
"""

if __name__ == "converters":
    raise ImportError("import minimind_mcore.converters instead of converters: a second copy of its classes differs")
