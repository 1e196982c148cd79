"""The language model inside a model that sees: read from `text_config`, its names moved to where the outer model has it."""

from typing import Any

from kvrun.spec import Config, Model, model_of, moved

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 4096,
    "intermediate_size": 11_008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
MISTRAL = {
    **LLAMA,
    "architectures": ["MistralForCausalLM"],
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
}
# What the inner model's class says where the file does not: an outer config states only what differs.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "gemma3_text": {"architectures": ["Gemma3ForCausalLM"]},
}
# Where earlier versions of the classes that call their inner model `model.language_model` kept their parts.
SPELLINGS = (
    ("model.language_model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.vision_tower.", "model.vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.image_newline", "image_newline"),
)


def language_model(c: Config, at: str, kind: str) -> Model:
    """The model that `text_config` describes, as a part of this one whose names begin with `at` instead of "model.".

    `kind` is its model_type where it does not say.
    """
    text = c.within("text_config").otherwise(model_type=kind)
    defaults = DEFAULTS.get(text.model_type, {})
    stated = {"architectures": text.get("architectures", defaults.get("architectures"))}
    if c.get("tie_word_embeddings") is not None:  # the head is the outer model's
        stated["tie_word_embeddings"] = c.tie_word_embeddings
    return moved(model_of(text.otherwise(**defaults).stating(**stated)), at)
