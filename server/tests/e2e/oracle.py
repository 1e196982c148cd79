"""What transformers and peft answer, greedily, for the same checkpoints: the oracle of the end-to-end tests."""

from pathlib import Path


def greedy(model_dir: Path, prompts: list[str], new_tokens: int, adapter: Path | None = None) -> list[list[int]]:
    """The ids that follow each prompt in float32, one prompt at a time, up to and including an end token."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
    answers = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([tokenizer.encode(prompt).ids])
            out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False)
            answers.append(out[0, ids.shape[1] :].tolist())
    return answers
