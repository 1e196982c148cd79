"""GPT-BigCode and SantaCoder."""

from tiny.row import COMMON, Row, Tensors

BIGCODE = {**COMMON, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512}


def santacoder(config: dict, tensors: Tensors) -> tuple[dict, Tensors]:
    """Every matrix of a layer stored [in, out], the queries apart from the one key and value."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        if ".attn.c_attn." in name:
            query, rest = tensor[:64], tensor[64:]
            found[name.replace("c_attn", "q_attn")] = query.T if query.dim() == 2 else query
            found[name.replace("c_attn", "kv_attn")] = rest.T if rest.dim() == 2 else rest
        else:
            found[name] = tensor.T if ".h." in name and tensor.dim() == 2 else tensor
    config = {**config, "architectures": ["GPT2LMHeadCustomModel"], "model_type": "gpt2", "attention_head_type": "multiquery"}
    del config["multi_query"]
    return config, found


ROWS = {
    "gpt_bigcode": Row("gpt_bigcode", {**BIGCODE, "multi_query": True}, seed=5),
    "gpt_bigcode_multi_head": Row("gpt_bigcode", {**BIGCODE, "multi_query": False}, seed=2),
    "santacoder": Row("gpt_bigcode", {**BIGCODE, "multi_query": True}, published=santacoder, architecture="GPT2LMHeadCustomModel", seed=5),
}
