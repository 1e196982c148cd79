"""GPT-BigCode (StarCoder) and SantaCoder: GPT-2 with one key/value head for all query heads."""

from kvrun.models.gpt2 import decoder
from kvrun.spec import Config, Fused, Model, Packed, architecture, fuse, linear, packed, transposed


@architecture("GPTBigCodeForCausalLM")
def gpt_bigcode(c: Config) -> Model:
    """StarCoder and its like; without multi_query, queries, keys and values alternate head by head."""
    shared = c.get("multi_query", True)
    qkv = packed("attn.c_attn", "parts" if shared else "per_group", bias=True)
    return decoder(c, qkv, _biased, kv_heads=1 if shared else c.num_attention_heads, act="gelu_pytorch_tanh")


@architecture("GPT2LMHeadCustomModel")
def santacoder(c: Config) -> Model:
    """SantaCoder, whose matrices are stored [in, out] and whose queries lie apart from its key and value."""
    c.only("attention_head_type", "multiquery")
    qkv: Fused | Packed = transposed(fuse("attn.q_attn", "attn.kv_attn", bias=True, parts=(1, 2)))
    return decoder(c, qkv, lambda name: transposed(_biased(name)), kv_heads=1)


def _biased(name: str) -> Fused:
    return linear(name, bias=True)
