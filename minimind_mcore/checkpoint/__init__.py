"""Checkpoints and weights in files: where they lie, what they hold, how they are cut, and safe ways to read them.

layout.py        the parallel layout, and which file of a checkpoint holds which part of which tensor
files.py         names of files and directories, and which checkpoint is meant
tracker.py       the file that names the newest checkpoint
choose.py        the newest checkpoint whose files are whole
unpickling.py    the classes that a checkpoint may name
torch_zip.py     the format of torch.save, read without executing what is in it
tensors.py       files of tensors, mapped for reading and laid out for writing
source.py        a model in files: a table of lazy tensors
opening.py       opens a model of any format: hf.py, minimind.py, megatron.py, megatron_dist.py
lora.py          adapters in files
"""
