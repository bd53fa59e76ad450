"""Print the folder that makes `torch_npu` the stand-in where it is on PYTHONPATH."""

from minimind_mcore_rehearsal import STAND_IN

print(STAND_IN)
