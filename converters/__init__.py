"""Convert weights from any MiniMind format to any other.

Every format is read into, and written from, the whole megatron-core model. Its tensors have the names of
`models/weights.py`. They are `Lazy`: shape and dtype are known, and the bytes are read on demand. A `Source` is a
table of lazy tensors over memory-mapped files. A `Target` is a set of files in which every tensor has a fixed offset. A
conversion (`convert.py`) is one pass that reads each tensor once and writes it to the target. The output is verified
with the same reading code.

    convert.py     the conversion, and the base class `Target`
    hf.py          writes Hugging Face directories and `.pth` files; megatron.py and peft.py write their formats
    conversion.py  a conversion with the options of the command lines
    main.py        the command lines of convert_ckpt_v2.py and convert_ckpt.py

`minimind_mcore/checkpoint/` reads the formats.
"""

if __name__ == "converters":
    raise ImportError("import minimind_mcore.converters instead of converters: a second copy has other classes")
