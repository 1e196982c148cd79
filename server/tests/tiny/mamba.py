"""Mamba, Falcon Mamba and Mamba 2."""

import torch

from tiny.row import COMMON, Row

RECURRENT = {**COMMON, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}
MAMBA2 = {**RECURRENT, "num_heads": 8, "head_dim": 16, "chunk_size": 16, "tie_word_embeddings": False}


def calm(model: torch.nn.Module) -> None:
    """Projections of a size that lets states last and stay within 16 bits, as training finds them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight")):
                parameter *= 0.2


ROWS = {
    "mamba": Row("mamba", RECURRENT, settle=calm),
    "mamba_biased": Row("mamba", {**RECURRENT, "use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "expand": 3}, settle=calm),
    "falcon_mamba": Row("falcon_mamba", {**RECURRENT, "mixer_rms_eps": 1e-6, "tie_word_embeddings": False}, settle=calm),
    "mamba2": Row("mamba2", {**MAMBA2, "n_groups": 2}, settle=calm),
    "mamba2_one_group": Row("mamba2", {**MAMBA2, "n_groups": 1, "use_bias": True, "time_step_limit": (0.3, 2.0)}, settle=calm),
    "mamba2_many_groups": Row("mamba2", {**MAMBA2, "n_groups": 4}, settle=calm),
}
