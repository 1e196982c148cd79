"""GLM 4, both of its orders."""

from tiny.row import LLAMA, Row, rope

GLM = {**LLAMA, **rope("default", partial_rotary_factor=0.5), "head_dim": 16, "attention_bias": True}

ROWS = {
    "glm": Row("glm", GLM, seed=1),
    "glm4": Row("glm4", GLM, seed=13),
}
