"""The Python shard of kv.run: it owns tensors, and nothing that cannot be sent to it again.

Importing this package imports neither torch nor gRPC.
"""

__version__ = "0.1.0"
