"""Train the built-in byte-level FlashSTU text model on the King James text, on a CPU.

    python examples/train_text.py --out runs/kjv --minutes 90

Every tenth chapter is held out. The model is trained in an equivalent, better conditioned form (`Trainee`)
and written as an ordinary FlashSTU checkpoint: `config.json` and `model.safetensors`, with
`learning_curve.png` and `report.json` beside them. Started again with `--resume`, a stopped run goes on from
its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import futurefill_rs as ff
import numpy as np
import torch
from futurefill_rs.nn.stu import spectral_filters
from safetensors.torch import save_file
from text_baselines import ngram_bits_per_byte, xz_bits_per_byte
from torch import Tensor, nn
from torch.nn import functional as F

LONG_SHARE = 0.15
"""The last part of the training sees windows as long as the filters."""

SAMPLE = 40_000
"""Held-out bytes measured during the training; the end measures them all."""


def read_chapters(path: Path | None) -> list[str]:
    """The chapters, each a heading, an empty line and one verse per line.

    Without a path the text comes from the `bible` command (Debian's bible-kjv and bible-kjv-text); a file
    must hold what `bible Genesis1:1-Revelation22:21` prints.
    """
    if path is None:
        command = ["bible", "Genesis1:1-Revelation22:21"]
        try:
            text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        except FileNotFoundError:
            raise SystemExit(
                "bible: command not found; install bible-kjv, or give its output as --text"
            ) from None
    else:
        text = path.read_text(encoding="utf-8")
    chapters: list[list[str]] = []
    for line in text.splitlines():
        if re.fullmatch(r"(?:[1-3] )?[A-Z][A-Za-z ]*? \d+", line):
            chapters.append([line, ""])
        elif verse := re.match(r"  +\d+ (.*)", line):
            chapters[-1].append(verse.group(1))
        elif line.strip():
            chapters[-1][-1] += " " + line
    if not chapters:
        raise SystemExit("text: expected chapters headed like 'Genesis 1', got none")
    return ["\n".join(lines) + "\n\n" for lines in chapters]


def split(chapters: Sequence[str]) -> tuple[bytes, bytes]:
    """Training text and held-out text: every tenth chapter is held out."""
    training = "".join(chapter for i, chapter in enumerate(chapters) if i % 10 != 9)
    return training.encode(), "".join(chapters[9::10]).encode()


def byte_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy()).long()


class Trainee(nn.Module):
    """FlashSTU in the form it is trained in.

    The filters are combinations of the spectral filters scaled to norm 1: as FlashSTU scales them they span
    several orders of magnitude, and no single learning rate fits. Features come first and time last,
    `(D, B, T)`, so that neither the convolutions nor the matrix products need a transposition. Matrix
    products are bfloat16 with float32 master weights. `checkpoint` folds all this back.
    """

    def __init__(self, config: dict[str, Any], phi: Tensor, seed: int) -> None:
        super().__init__()
        self.config = config
        width, count = config["n_embd"], config["n_layers"]
        hidden = width * config["mlp_scale"]
        self.scale = phi.norm(dim=0)
        self.basis = phi / self.scale
        random = torch.Generator().manual_seed(seed)

        def normal(rows: int, columns: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=random) * std)

        def ones() -> nn.ParameterList:
            return nn.ParameterList(torch.ones(width) for _ in range(count))

        self.embedding = normal(config["vocab_size"], width, 0.05)
        self.stu_norm, self.mlp_norm, self.norm = ones(), ones(), nn.Parameter(torch.ones(width))
        self.inputs = nn.ParameterList(normal(width, width, width**-0.5) for _ in range(count))
        self.gate_up = nn.ParameterList(normal(2 * hidden, width, width**-0.5) for _ in range(count))
        self.down = nn.ParameterList(normal(width, hidden, 0.3 * hidden**-0.5) for _ in range(count))
        self.filters = nn.ParameterList(
            nn.Parameter(0.5 * self.basis.T @ first_filters(len(phi), width, random)) for _ in range(count)
        )

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats; ids and targets `(B, T)`."""
        batch, length = ids.shape
        x = self.embedding[ids.reshape(-1)].T.contiguous()
        basis = self.basis[:length].T
        for i in range(self.config["n_layers"]):
            z = self.inputs[i].bfloat16() @ normalize(x, self.stu_norm[i])
            z = z.float().view(-1, batch, length)
            x = x + ff.causal_conv(z, (self.filters[i].T @ basis).unsqueeze(1)).reshape(len(x), -1)
            hidden = gated(self.gate_up[i].bfloat16() @ normalize(x, self.mlp_norm[i]))
            x = x + (self.down[i].bfloat16() @ hidden).float()
        logits = normalize(x, self.norm).T @ self.embedding.bfloat16().T
        return cross_entropy(logits, targets.reshape(-1))

    def checkpoint(self, weights: dict[str, Tensor], phi: Tensor) -> dict[str, Tensor]:
        """FlashSTU's tensors by upstream's names, matrices in bfloat16, from this module's `weights`."""
        state = {"phi": phi}
        for i in range(self.config["n_layers"]):
            layer = f"layers.{i}."
            gate, up = weights[f"gate_up.{i}"].chunk(2)
            state[layer + "stu.M_inputs"] = weights[f"inputs.{i}"].T.bfloat16()
            state[layer + "stu.M_filters"] = weights[f"filters.{i}"] / self.scale[:, None]
            state[layer + "stu_norm.weight"] = weights[f"stu_norm.{i}"]
            state[layer + "mlp_norm.weight"] = weights[f"mlp_norm.{i}"]
            state[layer + "mlp.gate_proj.weight"] = gate.bfloat16()
            state[layer + "mlp.up_proj.weight"] = up.bfloat16()
            state[layer + "mlp.down_proj.weight"] = weights[f"down.{i}"].bfloat16()
        state["norm.weight"] = weights["norm"]
        # Tied; the loader finds lm_head in it.
        state["tok_emb.weight"] = weights["embedding"].bfloat16()
        return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}


def first_filters(lags: int, width: int, random: torch.Generator) -> Tensor:
    """Initial filters `(lags, width)` of norm 1: single taps at lags 0 to 9, decays over 1 to 512 bytes."""
    filters = torch.zeros(lags, width)
    time_axis = torch.arange(lags, dtype=torch.float32)
    for channel in range(width):
        if channel % 2 == 0:
            lag = int(torch.empty(1).exponential_(0.3, generator=random)) % 10
            filters[lag, channel] = 1
        else:
            decay = torch.exp(-time_axis / 2 ** (9 * float(torch.rand(1, generator=random))))
            filters[:, channel] = decay / decay.norm()
    return filters


def normalize(x: Tensor, weight: Tensor) -> Tensor:
    """FlashSTU's RMSNorm over the features, here axis 0, in bfloat16."""
    mean = (x * x).mean(0, keepdim=True)
    return (x * torch.rsqrt(mean + torch.finfo(torch.float32).eps) * weight[:, None]).bfloat16()


def gated(x: Tensor) -> Tensor:
    gate, up = x.float().chunk(2)
    return (F.gelu(gate, approximate="tanh") * up).bfloat16()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


class Muon:
    """Momentum whose updates are made orthogonal by Newton-Schulz iterations (Jordan et al., 2024)."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(tuple(parameter.shape), []).append(parameter)
        self.momenta = {shape: torch.zeros(len(group), *shape) for shape, group in self.groups.items()}

    def step(self, rate: float, momentum: float, pool: ThreadPoolExecutor) -> None:
        def update(shape: tuple[int, ...]) -> None:
            with torch.no_grad():
                gradients = torch.stack([p.grad for p in self.groups[shape] if p.grad is not None])
                average = self.momenta[shape].lerp_(gradients, 1 - momentum)
                updates = orthogonal(gradients.lerp(average, momentum))
                factor = rate * max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, direction in zip(self.groups[shape], updates, strict=True):
                    parameter.mul_(1 - rate * self.decay).add_(direction, alpha=-factor)

        list(pool.map(update, sorted(self.groups, key=math.prod, reverse=True)))


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1, for `(N, rows, columns)`."""
    x = matrices.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.float().flatten(1).norm(dim=1)[:, None, None].bfloat16() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if wide else x.mT).float()


class Windows:
    """Batches of windows `(B, T + 1)`: an epoch is a permutation of windows that do not overlap."""

    def __init__(self, text: Tensor, epoch: int = 0, position: int = 0) -> None:
        self.text, self.epoch, self.position = text, epoch, position

    def __call__(self, batch: int, length: int) -> Tensor:
        random = torch.Generator().manual_seed(1000 + self.epoch)
        offset = int(torch.randint(0, length, (1,), generator=random))
        count = (len(self.text) - 1 - offset) // length
        order = torch.randperm(count, generator=random)
        if self.position + batch > count:
            self.epoch, self.position = self.epoch + 1, 0
            return self(batch, length)
        starts = offset + length * order[self.position : self.position + batch]
        self.position += batch
        return self.text[starts[:, None] + torch.arange(length + 1)]


class Training:
    """The state of a run: weights, their running average, optimisers, place in the text, history."""

    def __init__(self, args: argparse.Namespace, config: dict[str, Any], text: Tensor) -> None:
        self.args, self.config = args, config
        self.phi = spectral_filters(config["seq_len"], config["num_eigh"], config["use_hankel_L"])
        self.windows = Windows(text)
        self.model = Trainee(config, self.phi, args.seed)
        matrices = [*self.model.inputs, *self.model.gate_up, *self.model.down]
        chosen = {id(matrix) for matrix in matrices}
        self.others = [p for p in self.model.parameters() if id(p) not in chosen]
        self.muon = Muon(matrices, args.weight_decay)
        self.adam = torch.optim.AdamW(self.others, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.average = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.step, self.bytes_seen, self.seconds = 0, 0, 0.0
        self.compiled_length: int | None = None
        self.history: list[tuple[int, float, float | None]] = []
        self.pool = ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,))

    @property
    def progress(self) -> float:
        if self.args.steps:
            return self.step / self.args.steps
        return self.seconds / (60 * self.args.minutes)

    def advance(self) -> float:
        """One optimiser step; returns the loss in bits per byte."""
        args, model = self.args, self.model
        long = self.progress >= 1 - LONG_SHARE
        batch, length = (args.long_batch, self.config["seq_len"]) if long else (args.batch, args.window)
        rate = min(1.0, (self.step + 1) / 100) * min(1.0, max(0.0, (1 - self.progress) / (1 - args.flat)))
        parameters = list(model.parameters())

        def gradients(window: Tensor) -> tuple[float, tuple[Tensor, ...]]:
            loss = model(window[:, :-1].contiguous(), window[:, 1:].contiguous())
            return loss.item(), torch.autograd.grad(loss, parameters)

        # One window per task: a thread that other programs slow down holds up the others once a step only.
        windows = self.windows(batch, length).split(1)
        if args.compile and length != self.compiled_length:
            # The compiler is not made for several threads at once: the first of a kind goes alone.
            gradients(windows[0])
            self.compiled_length = length
        results = list(self.pool.map(gradients, windows))
        total = list(results[0][1])
        for _, more in results[1:]:
            torch._foreach_add_(total, more)
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient / len(results)
        nn.utils.clip_grad_norm_(self.others, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = args.rate * rate
        self.adam.step()
        self.muon.step(args.matrix_rate * rate, min(0.95, 0.85 + self.step / 10000), self.pool)
        model.zero_grad(set_to_none=True)
        self.step += 1
        self.bytes_seen += batch * length
        keep = min(0.99, 1 - 1 / (self.step / 5 + 1)) if rate > 0.3 else 0.97
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(model.state_dict().values()), 1 - keep)
        return sum(loss for loss, _ in results) / len(results) / math.log(2)

    def built(self) -> nn.Module:
        """The library's model with the averaged weights as the checkpoint stores them."""
        state = self.model.checkpoint(self.average, self.phi)
        return ff.models.build(self.config, {name: tensor.float() for name, tensor in state.items()})

    def write(self, folder: Path) -> None:
        """The checkpoint for users (config.json, model.safetensors) and the one to resume from."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        state = self.model.checkpoint(self.average, self.phi)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        content = {
            "model": self.model.state_dict(),
            "average": self.average,
            "momenta": self.muon.momenta,
            "adam": self.adam.state_dict(),
            "place": (self.windows.epoch, self.windows.position),
            "counters": (self.step, self.bytes_seen, self.seconds),
            "history": self.history,
        }
        torch.save(content, folder / "resume.tmp")
        os.replace(folder / "resume.tmp", folder / "resume.pt")

    def resume(self, folder: Path) -> None:
        content = torch.load(folder / "resume.pt", weights_only=True)
        self.model.load_state_dict(content["model"])
        self.average = content["average"]
        self.muon.momenta = content["momenta"]
        self.adam.load_state_dict(content["adam"])
        self.windows.epoch, self.windows.position = content["place"]
        self.step, self.bytes_seen, self.seconds = content["counters"]
        self.history = content["history"]


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Tensor, length: int) -> float:
    """Mean code length of `text` in windows of `length` that overlap by half: beyond the first window every
    byte is coded with at least `length / 2` bytes of context. The very first byte is not counted."""
    stride = length // 2
    bits, count, start, scored = 0.0, 0, 0, 1
    while scored < len(text):
        end = min(start + length + 1, len(text))
        logits = model(text[None, start : end - 1])[0, scored - start - 1 :]
        bits += F.cross_entropy(logits.float(), text[scored:end], reduction="sum").item() / math.log(2)
        count += end - scored
        scored, start = end, start + stride
    return bits / count


def report_progress(total: int | None) -> Callable[[int, str], None]:
    """A function that shows the step and a message: a tqdm bar if there is one, else lines."""
    try:
        from tqdm import tqdm
    except ImportError:

        def show(step: int, message: str) -> None:
            if step % 25 == 0:
                print(f"step {step}: {message}", file=sys.stderr, flush=True)

        return show
    bar = tqdm(total=total, unit="step", dynamic_ncols=True)

    def advance(step: int, message: str) -> None:
        bar.set_postfix_str(message, refresh=False)
        bar.update(step - bar.n)

    return advance


def plot(history: Sequence[tuple[int, float, float | None]], rivals: dict[str, float], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    axes.plot([row[0] for row in history], [row[1] for row in history], label="training", linewidth=0.8)
    measured = [(step, held) for step, _, held in history if held is not None]
    if measured:
        axes.plot(*zip(*measured, strict=True), label=f"held out, first {SAMPLE:,} bytes", marker=".")
    for index, (name, value) in enumerate(rivals.items()):
        axes.axhline(
            value, linestyle="--", linewidth=0.8, color=f"C{index + 2}", label=f"{name}: {value:.3f}"
        )
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(1.0, 3.0), title="FlashSTU on the King James text")
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    plt.close(figure)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        help="folder for the model, the checkpoint, the curve and the report",
    )
    add("--text", type=Path, help="what `bible Genesis1:1-Revelation22:21` prints (default: run it)")
    add("--minutes", type=float, default=90.0, help="training time (default 90)")
    add("--steps", type=int, help="train for so many steps instead: the same result every time")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--compile", action="store_true", help="compile the pointwise parts (needs a C++ compiler; faster)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads (default: all cores)")
    add("--seed", type=int, default=1611)
    add("--width", type=int, default=256, help="features")
    add("--layers", type=int, default=5)
    add("--mlp-scale", type=int, default=3, help="hidden features of a block per feature")
    add("--filters", type=int, default=40, help="spectral filters")
    add("--context", type=int, default=4096, help="lags of the filters")
    add("--window", type=int, default=1024, help="bytes of a training window, until the last part")
    add("--batch", type=int, default=4, help="windows of a step")
    add("--long-batch", type=int, default=2, help="windows of a step in the last part")
    add("--rate", type=float, default=6e-3, help="AdamW: embedding, norms and filters")
    add("--matrix-rate", type=float, default=0.03, help="Muon: matrices")
    add("--weight-decay", type=float, default=0.1, help="of the matrices, times their rate")
    add("--flat", type=float, default=0.03, help="share of the training before the rate decays to zero")
    add("--measure-every", type=int, default=400, help="steps between held-out measurements")
    args = parser.parse_args()
    if args.resume and not (args.out / "resume.pt").is_file():
        parser.error(f"--resume: expected resume.pt in {args.out}")
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    if args.compile:
        for function in (normalize, gated, cross_entropy):
            globals()[function.__name__] = torch.compile(function, dynamic=False)
    training_text, held_out_text = split(read_chapters(args.text))
    text, held_out = byte_tensor(training_text), byte_tensor(held_out_text)
    counted, measured = (np.frombuffer(part, np.uint8) for part in (training_text, held_out_text))
    rivals = {
        "xz -9, held-out part alone": xz_bits_per_byte(held_out_text),
        "xz -9 after the training text": xz_bits_per_byte(held_out_text, training_text),
        "5-gram, Kneser-Ney": ngram_bits_per_byte(measured, counted, 5, "kneser-ney"),
        "5-gram, Witten-Bell": ngram_bits_per_byte(measured, counted, 5, "witten-bell"),
    }
    config = {
        "kind": "flash_stu_lm",
        "n_embd": args.width,
        "n_layers": args.layers,
        "seq_len": args.context,
        "vocab_size": 256,
        "mlp_scale": args.mlp_scale,
        "num_eigh": args.filters,
        "use_hankel_L": True,
        "use_approx": True,
        "use_attn": False,
    }
    run = Training(args, config, text)
    if args.resume:
        run.resume(args.out)
    show = report_progress(args.steps)
    losses: list[float] = []
    while run.progress < 1:
        began = time.monotonic()
        losses.append(run.advance())
        run.seconds += time.monotonic() - began
        show(run.step, f"{losses[-1]:.3f} bits/byte, {100 * run.progress:.1f} % of the training")
        if run.step % 25 == 0:
            value = None
            if run.step % args.measure_every == 0:
                value = bits_per_byte(run.built(), held_out[:SAMPLE], args.context)
            run.history.append((run.step, sum(losses) / len(losses), value))
            losses.clear()
        if run.step % 100 == 0:
            run.write(args.out)
            plot(run.history, rivals, args.out / "learning_curve.png")
    run.write(args.out)
    # What users will load, not what was trained, is what counts.
    result = bits_per_byte(ff.models.load(args.out), held_out, args.context)
    if losses:
        value = bits_per_byte(run.built(), held_out[:SAMPLE], args.context)
        run.history.append((run.step, sum(losses) / len(losses), value))
    plot(run.history, {"this model, whole held-out part": result, **rivals}, args.out / "learning_curve.png")
    report = {
        "held_out_bits_per_byte": result,
        **rivals,
        "training_bytes": len(training_text),
        "held_out_bytes": len(held_out_text),
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "steps": run.step,
        "epochs": run.bytes_seen / len(training_text),
        "minutes": run.seconds / 60,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
