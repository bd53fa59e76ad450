"""A stand-in for torch_npu, with which programs for an NPU run on a CPU: the rehearsals of docs/ascend.md.

It is a package of its own, because nobody who trains needs it: the wheel of minimind-mcore does not contain it. A
checkout uses it from its folder. Elsewhere:

    pip install ./rehearsal
    PYTHONPATH=$(python -m minimind_mcore_rehearsal) python program_for_an_npu.py

`python/` is not a package: it goes on PYTHONPATH, and only there is `torch_npu` the stand-in. It holds

    torch_npu/      device names, streams, memory figures; hccl as gloo; the fused operators in eager PyTorch
    acl/ torchair/  modules that can be imported and do nothing
    *.dist-info     lets `import torch` load the stand-in, as it loads the real package

A rehearsal says nothing about the speed, memory or rounding of an NPU.

Settings: NPU_EMULATION_TRACE=1 prints at exit which operators ran how often, NPU_EMULATION_DEVICES is the
number of devices (default 8), NPU_EMULATION_NAME their name (default Ascend910B2).

Limits: host and device memory are the same; `tensor.device.type` is "cpu"; random numbers are the CPU
generator's; low precision is computed in float32 and rounded once per operator. Not emulated:
quantised formats, sparse attention, device graphs, swapped memory, communication addressed by an hccl
name (MC2, CoC), the explicit attention gradient in the TND layout.
"""

from pathlib import Path

STAND_IN = Path(__file__).resolve().parent / "python"
