"""Mamba: a stack of recurrent mixers and nothing else."""

from kvrun.spec import (
    Config,
    Convolution,
    Decoder,
    Embed,
    Head,
    Mamba,
    Mixer,
    Model,
    Residual,
    RmsNorm,
    architecture,
    linear,
    packed,
    stack,
)


@architecture("MambaForCausalLM")
def mamba(c: Config) -> Model:
    """Mamba of any size."""
    return recurrent(c, scan(c), tied=c.get("tie_word_embeddings", True))


def scan(c: Config, select_eps: float | None = None) -> Mamba:
    """The mixer of Mamba, with its choices normalised where `select_eps` says so."""
    bias, narrow = c.get("use_bias", False), c.get("time_step_rank", "auto")
    return Mamba(
        channels=c.get("intermediate_size", int(c.get("expand", 2) * c.hidden_size)),
        size=c.state_size,
        rank=-(-c.hidden_size // 16) if narrow == "auto" else narrow,
        project=packed("mixer.in_proj", bias=bias),
        conv=convolution(c),
        select=linear("mixer.x_proj"),
        step=linear("mixer.dt_proj"),
        decay="mixer.A_log",
        skip="mixer.D",
        out=linear("mixer.out_proj", bias=bias),
        select_eps=select_eps,
    )


def convolution(c: Config) -> Convolution:
    """The short convolution before a scan."""
    return Convolution("mixer.conv1d", c.conv_kernel, c.get("hidden_act", "silu"), c.get("use_conv_bias", True))


def recurrent(c: Config, mixer: Mixer, tied: bool) -> Model:
    """A stack of one kind of mixer, which has seen everything before a token and so needs no positions."""
    eps = c.layer_norm_eps
    return Model(
        Decoder(
            embed=Embed("backbone.embeddings", c.vocab_size, c.hidden_size),
            layers=stack(c.num_hidden_layers, "backbone.layers.{i}", [Residual(RmsNorm("norm", eps), mixer)]),
            head=Head(RmsNorm("backbone.norm_f", eps), "lm_head", tied=tied),
            wide=c.get("residual_in_fp32", True),
        ),
        positions=0,
    )
