"""Train a small HyenaDNA on a genome, generate bases on the CPU, and compare their 3-mer statistics.

The genome is a FASTA file, plain or gzipped. That of phage lambda (48,502 bases) comes with Debian's package
bowtie2-examples, as /usr/share/doc/bowtie2/examples/reference/lambda_virus.fa.gz.

    python examples/dna.py lambda_virus.fa.gz --steps 1500 --bases 100000 --out runs/dna

The model generates without bound: what lies further back than its filters reach drops out. A genome is read
on both strands; a 3-mer counts together with its reverse complement. Beside the model's bases, the same
number of bases drawn one by one with the genome's own frequencies shows what knowing only these would give.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import futurefill_rs as ff
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

BASES = "ACGT"
FIRST = 7
"""The id of A in HyenaDNA's vocabulary."""


def read_genome(path: Path) -> Tensor:
    """Bases 0..3 of all sequences in a FASTA file; anything but ACGT is left out."""
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("ascii")
    letters = "".join(line for line in text.upper().splitlines() if not line.startswith(">"))
    return torch.tensor([BASES.index(base) for base in letters if base in BASES])


def three_mers(genome: Tensor) -> Tensor:
    """Frequencies of the 64 3-mers, both strands together."""
    counts = torch.zeros(64)
    for strand in (genome, 3 - genome.flip(0)):
        words = strand[:-2] * 16 + strand[1:-1] * 4 + strand[2:]
        counts += torch.bincount(words, minlength=64)
    return counts / counts.sum()


def train(model: torch.nn.Module, genome: Tensor, steps: int, batch: int, length: int) -> float:
    """Fit the model to random windows of both strands; the mean loss of the last tenth, in bits per base."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    strands = torch.stack([genome, 3 - genome.flip(0)])
    losses = []
    progress = tqdm(range(steps), desc="training", unit="step")
    for _ in progress:
        starts = torch.randint(0, len(genome) - length - 1, (batch,)).tolist()
        sides = torch.randint(0, 2, (batch,)).tolist()
        window = torch.stack(
            [strands[side, s : s + length + 1] for side, s in zip(sides, starts, strict=True)]
        )
        logits = model(window[:, :-1] + FIRST)[..., FIRST : FIRST + 4]
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss) / 0.6931472)
        progress.set_postfix(bits=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def generate(model: torch.nn.Module, start: Tensor, count: int, seed: int) -> Tensor:
    """`count` bases after `start`, drawn from the model's own probabilities of A, C, G and T."""
    random = torch.Generator().manual_seed(seed)
    bases = []
    with torch.inference_mode():
        logits, cache = model.read_prompt(start[None] + FIRST, None)  # type: ignore[operator]
        for _ in tqdm(range(count), desc="generating", unit="base"):
            base = torch.multinomial(logits[0, FIRST : FIRST + 4].softmax(-1), 1, generator=random)
            bases.append(int(base))
            logits = model.step(base + FIRST, cache)  # type: ignore[operator]
    return torch.tensor(bases)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("genome", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--bases", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--length", type=int, default=512, help="lags of the filters and bases of a training window"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for the model and the generated FASTA file")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    genome = read_genome(options.genome)
    print(f"{len(genome):,} bases; order-0 entropy {entropy(torch.bincount(genome, minlength=4)):.4f} bits")
    model = ff.models.HyenaDNA(
        {
            "d_model": options.width,
            "n_layer": options.layers,
            "vocab_size": 12,
            "pad_vocab_size_multiple": 8,
            "layer": {"emb_dim": 5, "filter_order": 32, "l_max": options.length, "w": 10},
        }
    )
    start = time.perf_counter()
    bits = train(model.train(), genome, options.steps, options.batch, options.length)
    print(f"trained {time.perf_counter() - start:.0f} s: {bits:.4f} bits per base on the training windows")

    start = time.perf_counter()
    made = generate(model.eval(), genome[: options.length], options.bases, options.seed)
    seconds = time.perf_counter() - start
    print(
        f"generated {options.bases:,} bases in {seconds:.0f} s: {1e3 * seconds / options.bases:.3f} ms a base"
    )

    frequencies = torch.bincount(genome, minlength=4).float()
    drawn = torch.multinomial(frequencies, options.bases, replacement=True)
    want = three_mers(genome)
    print("3-mers: total variation distance from the genome, correlation with it")
    for name, sample in (("model", made), ("single bases", drawn)):
        got = three_mers(sample)
        distance = float((got - want).abs().sum() / 2)
        correlation = float(torch.corrcoef(torch.stack([got, want]))[0, 1])
        print(f"  {name:12s} {distance:.4f}  {correlation:.4f}")
    if options.out is not None:
        model.save(options.out)
        letters = "".join(BASES[i] for i in made.tolist())
        lines = [letters[i : i + 70] for i in range(0, len(letters), 70)]
        (options.out / "generated.fa").write_text("\n".join([">generated", *lines]) + "\n")
        print(f"model and bases are in {options.out}")


def entropy(counts: Tensor) -> float:
    p = counts / counts.sum()
    return float(-(p * p.log2()).sum())


if __name__ == "__main__":
    main()
