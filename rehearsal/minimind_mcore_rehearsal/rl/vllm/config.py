class ParallelConfig:
    data_parallel_size = 1
    pipeline_parallel_size = 1


class VllmConfig:
    parallel_config = ParallelConfig()


def get_current_vllm_config() -> None:
    return None
