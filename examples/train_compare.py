"""Train the same small language model twice, once with `ff.causal_conv` and once with plain `torch.fft`.

    python examples/train_compare.py [--steps 200] [--text FILE] [--plot curves.png]

Both runs start from the same weights and see the same batches, so their loss curves differ by rounding
alone. The script prints both curves and the time of each run, and fails if the curves part.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import futurefill_rs as ff
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

Conv = Callable[[Tensor, Tensor], Tensor]


def fft_conv(u: Tensor, filters: Tensor) -> Tensor:
    """The usual way: two real transforms of twice the length and one back."""
    n = 2 * u.shape[-1]
    return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(filters, n), n)[..., : u.shape[-1]]


class Block(nn.Module):
    """A gated long convolution and an MLP, both residual."""

    def __init__(self, width: int, lags: int, conv: Conv) -> None:
        super().__init__()
        self.conv = conv
        self.norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.project, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        # Filters start as decays of many lengths.
        rates = torch.logspace(0, -2.5, width).unsqueeze(1)
        self.filters = nn.Parameter(torch.exp(-rates * torch.arange(lags)) * rates)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.project(self.norm(x)).chunk(2, -1)
        y = self.conv(u.transpose(1, 2), self.filters).transpose(1, 2)
        x = x + self.out(y * F.silu(gate))
        return x + self.mlp(self.mlp_norm(x))


class Model(nn.Module):
    def __init__(self, width: int, layers: int, lags: int, conv: Conv) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width, lags, conv) for _ in range(layers)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(ids))))


def train(conv: Conv, data: Tensor, options: argparse.Namespace, name: str) -> tuple[list[float], float]:
    torch.manual_seed(options.seed)
    model = Model(options.width, options.layers, options.context, conv).to(options.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = torch.Generator().manual_seed(options.seed)
    losses: list[float] = []
    start = time.perf_counter()
    progress = tqdm(range(options.steps), desc=name)
    for _ in progress:
        at = torch.randint(len(data) - options.context, (options.batch,), generator=batches)
        window = torch.stack([data[i : i + options.context + 1] for i in at.tolist()]).to(options.device)
        loss = F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "LICENSE-APACHE")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--width", type=int, default=48)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--tolerance", type=float, default=0.05, help="largest difference of two losses, in nats"
    )
    parser.add_argument("--plot", type=Path, help="write both curves to this file")
    options = parser.parse_args()
    data = torch.tensor(list(options.text.read_bytes()))
    curves, times = {}, {}
    for name, conv in {"causal_conv": ff.causal_conv, "torch.fft": fft_conv}.items():
        curves[name], times[name] = train(conv, data, options, name)
    ours, plain = curves["causal_conv"], curves["torch.fft"]
    print(f"{'step':>6} {'causal_conv':>12} {'torch.fft':>12}")
    for step in [*range(0, options.steps, max(options.steps // 10, 1)), options.steps - 1]:
        print(f"{step:>6} {ours[step]:>12.4f} {plain[step]:>12.4f}")
    apart = max(abs(a - b) for a, b in zip(ours, plain, strict=True))
    print(f"largest difference {apart:.2g} nats; " + ", ".join(f"{n} {t:.1f} s" for n, t in times.items()))
    if options.plot:
        import matplotlib.pyplot as plt

        for name, curve in curves.items():
            plt.plot(curve, label=name, linestyle="-" if name == "causal_conv" else "--")
        plt.xlabel("step")
        plt.ylabel("loss (nats per byte)")
        plt.legend()
        plt.savefig(options.plot, dpi=150)
    if apart > options.tolerance:
        raise SystemExit(f"the curves part by {apart:.2g} nats")


if __name__ == "__main__":
    main()
