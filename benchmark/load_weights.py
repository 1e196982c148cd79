#!/usr/bin/env python3
"""Load a model in this process, once, and say in a line of JSON what that took.

    load_weights.py FOLDER [--quantize METHOD] [--packed-cache DIR]
    load_weights.py FOLDER --transformers

`imports`, `loaded` and `processor`, of `loaded` alone, are seconds; `peak` is how far the process's memory rose meanwhile and
`weights` what the weights take, both in bytes. transformers maps the file and computes a token afterwards, for `first_token`
seconds: some of it is read only then.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(key: str) -> int:
    """What the system says of this process's memory, in bytes: VmRSS, or VmHWM for the most there was since the peak was reset."""
    return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--quantize", help="as the server's own")
    parser.add_argument("--packed-cache", type=Path, help="as the server's own")
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


def main() -> None:
    args = parse()
    began = time.perf_counter()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.transformers:
        from transformers import AutoModelForCausalLM

        def load() -> tuple[Any, int]:
            model = AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)
            return model, sum(parameter.nbytes for parameter in model.parameters())
    else:
        import kvrun_kernels
        from kvrun.nn.build import load_model

        if args.threads:
            kvrun_kernels.set_num_threads(args.threads)

        def load() -> tuple[Any, int]:
            model = load_model(args.folder, dtype="bfloat16", quantize=args.quantize, packed_cache=args.packed_cache)
            return model, model.weight_bytes

    said = {"imports": time.perf_counter() - began}
    CLEAR.write_text("5")
    before, spent, began = memory("VmRSS"), time.process_time(), time.perf_counter()
    model, weights = load()
    said |= {"loaded": time.perf_counter() - began, "processor": time.process_time() - spent}
    if args.transformers:
        began = time.perf_counter()
        with torch.inference_mode():
            model(torch.tensor([[1]]))
        said["first_token"] = time.perf_counter() - began
    print(json.dumps({**said, "peak": memory("VmHWM") - before, "weights": weights}))


if __name__ == "__main__":
    main()
