"""Long prompts, scores and steps of whole models: memory and time, one thread, random weights.

    python benches/models.py                    # every figure, in about an hour
    python benches/models.py --only C1,C5 --docs
    python benches/models.py --upstream PATH    # a checkout of HazyResearch/hyena-dna, for C3 (needs einops)

Every figure runs in a process of its own, whose peak memory is its own. Seconds are those that the thread
spent on a processor, so that other work on the machine counts little. `--docs` writes the table into
docs/models.md; figures that are not measured keep those of the last run (benches/out/models.json).
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OUT = HERE / "out" / "models.json"
GB = 1e9
DNA_1M = 1_000_000
LONG = 131_072

EVO_2 = {
    "vocab_size": 512,
    "hcs_filter_length": 7,
    "hcm_filter_length": 128,
    "state_size": 16,
    "short_filter_length": 3,
    "short_filter_bias": False,
    "eps": 1e-6,
    "column_split_hyena": False,
    "interleave": True,
    "evo2_style_activations": True,
    "tie_embeddings": True,
    "qkv_proj_bias": False,
    "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True,
}


def evo_2(width: int, heads: int, inner: int, groups: int, layers: int, rotary_base: float) -> dict[str, Any]:
    """Upstream's pattern: attention at every seventh block from the fourth on, short, medium and long filters
    in turn between."""
    kinds: dict[str, list[int]] = {"hcs": [], "hcm": [], "hcl": [], "attn": []}
    turn = 0
    for i in range(layers):
        if i % 7 == 3:
            kinds["attn"].append(i)
        else:
            kinds[("hcs", "hcm", "hcl")[turn % 3]].append(i)
            turn += 1
    return {
        **EVO_2,
        "hidden_size": width,
        "num_attention_heads": heads,
        "inner_mlp_size": inner,
        "num_layers": layers,
        "hcs_filter_groups": groups,
        "hcm_filter_groups": groups,
        "rotary_emb_base": rotary_base,
        **{f"{kind}_layer_idxs": layers for kind, layers in kinds.items()},
    }


def evo_2_1b() -> dict[str, Any]:
    return evo_2(1920, 15, 5120, 128, 25, 10000)


def evo_2_7b() -> dict[str, Any]:
    return evo_2(4096, 32, 11264, 256, 32, 1e11)


def dna_1m(layers: int) -> Any:
    """`hyenadna-large-1m`, or some layers of it."""
    import futurefill_rs as ff
    import torch

    torch.manual_seed(0)
    layer = {"emb_dim": 5, "filter_order": 64, "l_max": DNA_1M + 2, "w": 10}
    config = {"d_model": 256, "n_layer": layers, "d_inner": 1024, "vocab_size": 12, "layer": layer}
    return ff.models.HyenaDNA({**config, "pad_vocab_size_multiple": 8}).eval()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def read_dna(length: int, layers: int) -> dict[str, float]:
    """Reading a prompt with room for 500 bases."""
    import torch

    model = dna_1m(layers)
    ids = torch.randint(7, 11, (1, length))
    with torch.inference_mode():
        model.read_prompt(ids[:, :4096], 500)
        spent = seconds(lambda: model.read_prompt(ids, 500))
    return {"seconds": spent, "peak": peak_bytes()}


def upstream_dna(checkout: str, length: int, layers: int) -> dict[str, float]:
    """Upstream's forward of the same model with filters of `length` lags."""
    import hyenadna
    import torch

    module = hyenadna.upstream_module(checkout)
    layer = {"emb_dim": 5, "filter_order": 64, "l_max": length, "w": 10}
    config = {"d_model": 256, "n_layer": layers, "d_inner": 1024, "vocab_size": 12, "layer": layer}
    model = module.HyenaDNAModel(**config, pad_vocab_size_multiple=8).eval()
    ids = torch.randint(7, 11, (1, length))
    with torch.inference_mode():
        model(ids[:, :4096])
        return {"seconds": seconds(lambda: model(ids)), "peak": peak_bytes()}


def block_peak(kind: str, length: int) -> dict[str, float]:
    """One block of Evo 2 7B in bfloat16 over a sequence: the memory beside its weights."""
    import torch
    from futurefill_rs.models.striped_hyena_2 import _block
    from futurefill_rs.nn.reading import Reading, piece_for

    torch.manual_seed(0)
    config = evo_2_7b()
    width = config["hidden_size"]
    with torch.inference_mode():
        block = _block(config, config[f"{kind}_layer_idxs"][0]).bfloat16().eval()
        for name in ("log_poles", "residues"):
            for owner in block.modules():
                if name in owner._parameters:
                    owner._parameters[name] = owner._parameters[name].float()
        table = torch.randn(512, width).bfloat16()
        # The peak so far is that of making the weights in float32.
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        time_ = Reading(length, piece_for(1, width, table.device), kept=False)
        ids = torch.randint(0, 512, (1, length))

        def run() -> None:
            x = time_.apart(lambda part: table[part].float(), ids)
            time_.across(block, x)

        spent = seconds(run)
    return {"seconds": spent, "arrays": (_status("VmHWM") - before) / (4 * length * width)}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def wall(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def steps_1b() -> dict[str, float]:
    """Steps of Evo 2 1B in bfloat16 after a prompt of 64, at batch sizes 1 and 8."""
    import futurefill_rs as ff
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = ff.models.StripedHyena2(evo_2_1b()).eval()
    torch.set_default_dtype(torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    found: dict[str, float] = {"weights": weights}
    matrix, vector = torch.ones(16384, 8192), torch.ones(8192)
    with torch.inference_mode():
        for rows in (1, 8):
            _, cache = model.read_prompt(torch.randint(0, 256, (rows, 64)), None)
            steps, passes = [], []
            for id in torch.randint(0, 256, (20, rows)):
                steps.append(wall(partial(model.step, id, cache)))
                passes.append(matrix.nbytes / wall(partial(torch.mv, matrix, vector)))
            # Medians of turns taken in the same seconds.
            found[f"step_{rows}"] = sorted(steps)[10]
            found.setdefault("bandwidth", sorted(passes)[10])
    return found


def score_dna(length: int, layers: int) -> dict[str, float]:
    """Scoring a sequence, and `forward` over it in one piece."""
    import torch

    model = dna_1m(layers)
    ids = torch.randint(7, 11, (1, length))
    with torch.inference_mode():
        model.score(ids[:, :4096])
        found = {"score": min(seconds(lambda: model.score(ids)) for _ in range(2))}
        found["forward"] = min(seconds(lambda: model(ids)) for _ in range(2))
    return found


CONTEXT = 1024
"""Positions read before the steps whose rows are counted."""


def many_dna(rows: int, new: int) -> dict[str, float]:
    """Bases a second of HyenaDNA 8 x 256 at a batch size."""
    import futurefill_rs as ff
    import torch

    torch.manual_seed(0)
    layer = {"emb_dim": 5, "filter_order": 64, "l_max": 1 << 14, "w": 10}
    config = {"d_model": 256, "n_layer": 8, "d_inner": 1024, "vocab_size": 12, "layer": layer}
    model = ff.models.HyenaDNA(config).eval()
    with torch.inference_mode():
        logits, cache = model.read_prompt(torch.randint(7, 11, (rows, CONTEXT)), new)

        def step() -> None:
            nonlocal logits
            logits = model.step(logits.argmax(-1), cache)

        return {"rate": rows / median_wall(step, new)}


def many_gpt2(rows: int, new: int) -> dict[str, float]:
    """The same of transformers' GPT-2 8 x 256 with its cache of keys and values."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=12, n_positions=1 << 12, n_embd=256, n_layer=8, n_head=4)
    model = GPT2LMHeadModel(config).eval()
    with torch.inference_mode():
        out = model(torch.randint(7, 11, (rows, CONTEXT)), use_cache=True, logits_to_keep=1)

        def step() -> None:
            nonlocal out
            out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

        return {"rate": rows / median_wall(step, new)}


def median_wall(run: Callable[[], object], count: int) -> float:
    return sorted(wall(run) for _ in range(count))[count // 2]


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    f.__name__: f for f in (read_dna, upstream_dna, block_peak, steps_1b, score_dna, many_dna, many_gpt2)
}


def part(name: str, *arguments: Any) -> dict[str, float]:
    """A part of the figures, run in a process of its own."""
    print(f"[{time.strftime('%H:%M:%S')}] {name}{arguments}", file=sys.stderr, flush=True)
    command = [sys.executable, __file__, "--part", name, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    found: dict[str, float] = json.loads(done.stdout)
    return found


Row = dict[str, Any]


def measure(options: argparse.Namespace, rows: dict[str, Row]) -> None:
    """Fill in the rows that are asked for; what one cannot have is its note."""
    wanted = options.only.split(",") if options.only else list(FIGURES)
    before = dict(rows)
    for key in wanted:
        try:
            value, note = FIGURES[key][2](options, rows)
        except (RuntimeError, ValueError, KeyError) as error:
            value, note = None, f"not measured: {error}"
        rows[key] = {"value": value, "note": note, "date": time.strftime("%Y-%m-%d")}
        # Another run may have added to it: only what is new here is written.
        new = {name: row for name, row in rows.items() if row is not before.get(name)}
        rows.update({**last_run(), **new})
        OUT.parent.mkdir(exist_ok=True)
        OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def last_run() -> dict[str, Row]:
    found: dict[str, Row] = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    return found


Figure = tuple[float | None, str]


def read_1m(options: argparse.Namespace, rows: dict[str, Row]) -> Row:
    """The prompt of a million bases, read once for C1 to C3."""
    found = rows.get("read_1m")
    if found is None or found["layers"] != options.layers:
        found = {**part("read_dna", DNA_1M, options.layers), "layers": options.layers}
        rows["read_1m"] = found
    return found


def c1(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    rows.pop("read_1m", None)
    found = read_1m(options, rows)
    return found["peak"] / GB, f"{found['seconds']:.0f} s, {options.layers} layers"


def c2(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    long = read_1m(options, rows)["seconds"] / DNA_1M
    short = part("read_dna", LONG, options.layers)["seconds"] / LONG
    return long / short, f"{1e6 * long:.0f} / {1e6 * short:.0f} µs a position"


def c3(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    if options.upstream is None:
        raise ValueError("give a checkout of HazyResearch/hyena-dna with --upstream")
    theirs = part("upstream_dna", options.upstream, LONG, options.layers)["seconds"] / LONG
    ours = read_1m(options, rows)["seconds"] / DNA_1M
    # Its transforms cost more per position where they are longer; that is left out.
    return (
        theirs / ours,
        f"{1e6 * theirs:.0f} (taken to be the same at 10^6) / {1e6 * ours:.0f} µs a position",
    )


def c4(kind: str) -> Callable[[argparse.Namespace, dict[str, Row]], Figure]:
    def run(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
        found = part("block_peak", kind, options.block_length)
        length = "" if options.block_length == LONG else f"{options.block_length:,} positions; "
        return found["arrays"], f"{length}{found['seconds']:.0f} s of one thread"

    return run


def steps(rows: dict[str, Row]) -> Row:
    found: Row = part("steps_1b")
    rows["steps"] = found
    return found


def c5(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    found = steps(rows)
    least = found["weights"] / found["bandwidth"]
    note = (
        f"{1e3 * found['step_1']:.0f} ms a step, {found['weights'] / GB:.2f} GB of weights, "
        f"{found['bandwidth'] / GB:.1f} GB/s"
    )
    return found["step_1"] / least, note


def c6(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    found = rows.get("steps") or steps(rows)
    return found["step_8"] / found["step_1"], f"{1e3 * found['step_8']:.0f} ms a step"


def c7(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    found = part("score_dna", LONG, options.few_layers)
    return found["score"] / found["forward"], f"{options.few_layers} of the layers of hyenadna-large-1m"


def many(options: argparse.Namespace, rows: dict[str, Row]) -> Figure:
    """Bases a second of ours and of the transformer, at several batch sizes."""
    for size in BATCHES:
        new = 60 if size < 32 else 20
        rows[f"many {size}"] = {name: part(name, size, new)["rate"] for name in ("many_dna", "many_gpt2")}
    return rows["many 1"]["many_dna"] / rows["many 1"]["many_gpt2"], "see below"


BATCHES = (1, 8, 32, 64)

FIGURES: dict[str, tuple[str, float, Callable[[argparse.Namespace, dict[str, Row]], Figure], bool]] = {
    "C1": ("`hyenadna-large-1m`, a prompt of 1,000,000: peak memory, GB", 5.0, c1, True),
    "C2": ("seconds per position at 10^6 / at 131,072", 1.3, c2, True),
    "C3": ("upstream's forward, extrapolated from 131,072 / ours at 10^6", 1.5, c3, False),
    "C4 hcs": (
        "a block of Evo 2 7B, bfloat16, 131,072: memory in arrays (T, D) of float32",
        4.0,
        c4("hcs"),
        True,
    ),
    "C4 hcm": ("the same, medium filters", 4.0, c4("hcm"), True),
    "C4 hcl": ("the same, exponentials", 4.0, c4("hcl"), True),
    "C4 attention": ("the same, attention", 4.0, c4("attn"), True),
    "C5": ("Evo 2 1B, bfloat16: a step / reading the weights", 1.3, c5, True),
    "C6": ("the same: a step of 8 rows / of one", 2.0, c6, True),
    "many": ("HyenaDNA / GPT-2, bases a second of one sequence", 1.0, many, False),
    "C7": ("`score` of 131,072 / `forward` in one piece", 1.1, c7, True),
}
"""What it says, the target, how it is measured, and whether it should be at most the target."""

REASONS = {
    "C2": "each doubling adds a level of tiles; and the two were not run in the same minutes",
    "C3": "upstream was not run at 10^6, where its transforms should cost more a position",
    "C5": "93 % of a profiled step is torch's products, at 13 GB/s; alone they reach the bandwidth",
}
"""Why a figure may miss its target."""


def table(rows: dict[str, Row]) -> str:
    lines = ["| # | figure | target | measured | |", "| --- | --- | --- | --- | --- |"]
    for key, (what, target, _, most) in FIGURES.items():
        row = rows.get(key)
        if row is None or key == "many":
            continue
        value = row["value"]
        shown, verdict = "", ""
        if value is not None:
            shown = f"{value:.2f}"
            if not ((value <= target) == most or value == target):
                verdict = f"missed: {REASONS.get(key, 'see the figure')}; "
        bound = "at most" if most else "at least"
        lines.append(f"| {key} | {what} | {bound} {target:g} | {shown} | {verdict}{row['note']} |")
    sizes = [size for size in BATCHES if f"many {size}" in rows]
    if sizes:
        lines += ["", f"Bases (tokens) a second after {CONTEXT} positions, models of 8 x 256 in float32:", ""]
        lines += ["| batch | " + " | ".join(map(str, sizes)) + " |", "| --- " * (len(sizes) + 1) + "|"]
        for name, label in (
            ("many_dna", "HyenaDNA"),
            ("many_gpt2", "GPT-2 of transformers, keys and values kept"),
        ):
            rates = " | ".join(f"{rows[f'many {size}'][name]:,.0f}" for size in sizes)
            lines.append(f"| {label} | {rates} |")
    return "\n".join(lines)


def fill(page: Path, text: str) -> None:
    begin, end = "<!-- benches/models.py: begin -->", "<!-- benches/models.py: end -->"
    content = page.read_text(encoding="utf-8")
    head, _, rest = content.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise SystemExit(f"{page}: expected the markers {begin} and {end}")
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="figures like C1,C5 (default: all)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model of C1")
    parser.add_argument(
        "--few-layers", type=int, default=1, help="layers where layers are compared (C2, C3, C7)"
    )
    parser.add_argument("--block-length", type=int, default=LONG, help="positions of C4")
    parser.add_argument("--upstream", metavar="PATH", help="checkout of HazyResearch/hyena-dna, for C3")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/models.md")
    parser.add_argument("--render", action="store_true", help="measure nothing: the last run's figures")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        import torch

        torch.set_num_threads(1)
        name, arguments = options.part
        print(json.dumps(PARTS[name](*json.loads(arguments))))
        return 0
    rows = last_run()
    if not options.render:
        measure(options, rows)
    print(table(rows))
    if options.docs:
        fill(HERE.parent / "docs" / "models.md", table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
