"""Baichuan 1 and 2: Llama's shape with packed attention; the 13B sizes tell positions by slopes, the second age has a unit head."""

from dataclasses import fields, replace

from kvrun.models.llama import attention, decoder
from kvrun.spec import Alibi, Config, Model, UnitHead, architecture, packed

BAICHUAN2_VOCABULARY = 125_696
HIDDEN_7B = 4096


@architecture("BaichuanForCausalLM", "BaiChuanForCausalLM")
def baichuan(c: Config) -> Model:
    """Baichuan; only the first 7B spells its class with a capital C."""
    turned = c.architecture == "BaiChuanForCausalLM" or c.hidden_size == HIDDEN_7B
    whole = attention(c)
    whole = replace(whole, qkv=packed("self_attn.W_pack"), position=whole.position if turned else Alibi())
    model = decoder(c, lambda i: whole)
    if c.vocab_size != BAICHUAN2_VOCABULARY and c.get("z_loss_weight") is None:
        return model
    head = model.decoder.head
    unit = UnitHead(**{field.name: getattr(head, field.name) for field in fields(head)})
    return replace(model, decoder=replace(model.decoder, head=unit))
