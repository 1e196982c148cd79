"""LoRA adapters: PEFT folders read, checked and cut for this rank, and the segments of a step that use them."""
