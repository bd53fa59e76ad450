"""A stand-in for torch_npu, with which programs for an NPU run on a CPU; the rehearsals of docs/ascend.md.

`python/` is no package: it goes on PYTHONPATH (examples/mcore/minimind/rehearse.sh), and only there is
`torch_npu` the stand-in. It holds

    torch_npu/      device names, streams, memory figures; hccl as gloo; the fused operators in eager PyTorch
    acl/ torchair/  to be imported, no more
    *.dist-info     lets `import torch` load the stand-in, as it loads the real package

It says nothing about the speed, memory or rounding of an NPU.

Settings: NPU_EMULATION_TRACE=1 prints at exit which operators ran how often, NPU_EMULATION_DEVICES is the
number of devices (default 8), NPU_EMULATION_NAME their name (default Ascend910B2).

Limits: host and device memory are the same; `tensor.device.type` is "cpu"; random numbers are the CPU
generator's; low precision is computed in float32 and rounded once per operator. Not emulated:
quantised formats, sparse attention, device graphs, swapped memory, communication addressed by an hccl
name (MC2, CoC), the explicit attention gradient in the TND layout.
"""
