"""gpt-oss."""

import torch

from tiny.row import LLAMA, Row, rope

YARN = rope("yarn", factor=4.0, original_max_position_embeddings=32, truncate=False, beta_fast=32.0, beta_slow=1.0)
GPT_OSS = {**LLAMA, **YARN, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8}


def gentle(model: torch.nn.Module) -> None:
    """Give queries and keys the size of what they are of: a token looks at many others, and at the sinks.

    With keys as large as elsewhere, the last bit of a float32 decides among keys or experts in every draw that was tried.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter *= 1 / 6


ROWS = {"gpt_oss": Row("gpt_oss", GPT_OSS, adjust=gentle)}
