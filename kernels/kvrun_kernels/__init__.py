"""The numeric kernels of kv.run, each with a plain-PyTorch reference that defines it.

Callers write `from kvrun_kernels import ops` and name an op; which code runs is decided here, by the processor.
This package knows tensors. It never knows a model, a rank, an adapter's name or a request.
"""

from kvrun_kernels.dispatch import describe, first_steps, get_num_threads, levels, set_num_threads, use

__all__ = ["describe", "first_steps", "get_num_threads", "levels", "set_num_threads", "use"]
