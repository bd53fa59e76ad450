from types import SimpleNamespace

# What a 910B answers.
_PROPERTIES = {"num_aicore": 24, "num_vectorcore": 48}
active = SimpleNamespace(
    utils=SimpleNamespace(get_device_properties=lambda _device: _PROPERTIES),
    get_current_target=lambda: SimpleNamespace(backend="npu", arch="Ascend910B2", warp_size=0),
    get_current_device=lambda: 0,
)
