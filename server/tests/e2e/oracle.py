"""transformers and peft as the judges of greedy answers, in float32, for the same checkpoints."""

from functools import cache
from pathlib import Path

TIE = 2e-5  # of the logits' standard deviation: two sums of the same numbers in another order differ by less


@cache
def _loaded(model_dir: Path, adapter: Path | None):
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return model, Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def surprises(model_dir: Path, prompts: list[str], answers: list[list[int]], new_tokens: int, adapter: Path | None = None) -> list[str]:
    """Where an answer is not what greedy `generate` gives: a sentence for each such place, none when all agree.

    Every token must be the judge's first choice given those before it (which, by induction, is the greedy answer), and an
    answer may be shorter than `new_tokens` only when it ends with the end token.
    """
    import torch

    model, tokenizer = _loaded(Path(model_dir), adapter)
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer.encode(prompt).ids
        with torch.inference_mode():
            logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1].float()
        gap = (logits.amax(-1) - logits[torch.arange(len(answer)), torch.tensor(answer)]) / logits.std()
        found += [
            f"{prompt!r}: token {i} is {answer[i]}, {gap[i]:.1e} std below the first" for i in torch.nonzero(gap > TIE).flatten().tolist()
        ]
        if len(answer) != new_tokens and answer[-1] not in ends:
            found.append(f"{prompt!r}: stopped after {len(answer)} tokens without an end token")
        if ends & set(answer[:-1]):
            found.append(f"{prompt!r}: went on after an end token")
    return found
