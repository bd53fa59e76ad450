"""Weights from any MiniMind format to any other.

One idea carries it. The whole megatron-core model, as `models/weights.py` names it, is what every format
is read as and written from, and a tensor of it is `Lazy`: shape and dtype are known, bytes are read when
asked for. So a `Source` is a table of lazy tensors over memory-mapped files, a `Target` a set of files whose
every byte has its place before the first is written, and a conversion (`convert.py`) one pass that reads
each tensor once and hands it to the target. Reading back what was written is the same code again.

    files.py       tensor files, mapped for reading, laid out for writing; every byte counted
    torch_zip.py   the format of torch.save, without executing what is in it
    sharding.py    which file of a Megatron checkpoint holds which part of which tensor
    source.py      what a conversion reads from: tables of lazy tensors, and changes to them
    hf.py minimind.py megatron.py megatron_dist.py    the formats
    lora.py        adapters: merged, or as PEFT has them
    convert.py     the conversion, top to bottom
    cli.py         the command lines of convert_ckpt_v2.py and convert_ckpt.py
"""

if __name__ == "converters":
    raise ImportError("import minimind_mcore.converters instead of converters: a second copy of its classes differs")
