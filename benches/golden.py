"""Errors against upstream's own outputs, for every golden file: relative L2 of `forward`, and the worst of
`prefill` and steps over every prompt length, with a bounded and an unbounded cache.

    python benches/golden.py
"""

import json
from pathlib import Path

import torch
from futurefill_rs import models
from safetensors import safe_open


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


@torch.inference_mode()
def main() -> None:
    print("| file | forward | prefill and steps, every prompt length |\n| --- | --- | --- |")
    for path in sorted((Path(__file__).parents[1] / "tests" / "golden").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()["config"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        state = {key.removeprefix("param."): t for key, t in tensors.items() if key.startswith("param.")}
        module = models.build(config, state)
        x = tensors["input"] if "input" in tensors else tensors["input_ids"]
        want = tensors["output"] if "output" in tensors else tensors["logits"]
        length, worst = x.shape[1], 0.0
        for prompt in range(1, length + 1):
            for max_new in (length - prompt, None):
                y, cache = module.prefill(x[:, :prompt], max_new)
                steps = [module.step(x[:, t], cache)[:, None] for t in range(prompt, length)]
                worst = max(worst, error(torch.cat([y, *steps], 1), want))
        print(f"| {path.stem} | {error(module(x), want):.1e} | {worst:.1e} |", flush=True)


if __name__ == "__main__":
    main()
