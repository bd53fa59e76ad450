"""Checkpoints and weights in files: locations, contents, sharding, and safe readers.

layout.py        the parallel layout, and which file of a checkpoint holds which part of which tensor
files.py         names of files and directories, and the directory of a checkpoint
tracker.py       the file that names the newest checkpoint
choose.py        the newest undamaged checkpoint
unpickling.py    the classes that the pickle of a checkpoint may contain
torch_zip.py     reader and writer of torch.save's format; the reader executes nothing of a file
tensors.py       memory-mapped tensor files
source.py        a model in files: a table of lazy tensors
opening.py       opens a model of any format: hf.py, minimind.py, megatron.py, megatron_dist.py
assumptions.py   settings that the tensors of a model do not determine
padding.py       pads attention heads with zeros
lora.py          LoRA adapters in files
"""
