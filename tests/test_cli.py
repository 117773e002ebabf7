"""The command line: what it prints, and that every failure is one line and exit status 2."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from futurefill_rs import bench, models
from futurefill_rs.cli import main

COMMAND = [sys.executable, "-m", "futurefill_rs.cli"]
CONFIG = {
    "n_embd": 16,
    "n_layers": 2,
    "seq_len": 64,
    "vocab_size": 256,
    "mlp_scale": 2,
    "num_eigh": 4,
    "use_hankel_L": False,
    "use_approx": True,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("model")
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        made = models.FlashSTU(CONFIG)
        for parameter in made.parameters():
            parameter.mul_(3)
    made.save(path)
    return str(path)


@pytest.fixture
def generate(model, capsysbinary):
    """Runs `generate` in this process; returns what it wrote to standard output."""

    def run(*arguments: str) -> bytes:
        assert main(["generate", *arguments, "--model", model]) == 0
        run.notes = capsysbinary.readouterr()
        return run.notes.out

    return run


def failure(capsysbinary, *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsysbinary.readouterr()
    message = captured.err.decode()
    assert message.startswith("futurefill: ") and message.endswith("\n") and message.count("\n") == 1, message
    return message


def run(*arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=120, **options)


def one_line(stderr: bytes) -> str:
    text = stderr.decode()
    assert text.count("\n") == 1 and text.endswith("\n") and "Traceback" not in text, text
    return text


def test_prompt_and_continuation_are_printed_and_nothing_else(generate):
    out = generate("In the", "--max-new", "40", "--seed", "1")
    assert out.startswith(b"In the") and len(out) == 46
    closing = generate.notes.err.decode()
    assert re.fullmatch(r"futurefill: 40 tokens, [\d.]+ tokens/s .*\n", closing)


def test_a_seed_repeats_the_draws_and_another_seed_does_not(generate):
    options = ("In the", "--max-new", "30", "--temperature", "1.5")
    assert generate(*options, "--seed", "1") == generate(*options, "--seed", "1")
    assert generate(*options, "--seed", "1") != generate(*options, "--seed", "2")


@pytest.mark.parametrize(
    "sampling", [("--temperature", "0"), ("--seed", "3", "--top-k", "20", "--top-p", "0.9")]
)
def test_every_method_writes_the_same(generate, sampling):
    texts = {
        generate("In the", "--max-new", "200", *sampling, "--method", method)
        for method in ("auto", "naive", "epoched", "continuous")
    }
    assert len(texts) == 1


def test_nothing_new_prints_the_prompt(generate):
    assert generate("In the", "--max-new", "0") == b"In the"


def test_an_empty_prompt_says_what_stands_in_for_it(generate):
    out = generate("", "--max-new", "8", "--seed", "1")
    assert len(out) == 8
    assert "empty prompt" in generate.notes.err.decode().splitlines()[0]
    assert generate("\n", "--max-new", "8", "--seed", "1") == b"\n" + out


def test_bytes_that_are_not_utf8_pass_unchanged(generate, model):
    prompt = b"\xff\xfe caf\xc3\xa9 \xed\xa0\x80 \xc3"
    out = generate(os.fsdecode(prompt), "--max-new", "5", "--seed", "1")
    assert out.startswith(prompt) and len(out) == len(prompt) + 5
    assert run("generate", prompt, "--model", model, "--max-new", "5", "--seed", "1").stdout == out


def test_a_prompt_of_a_megabyte_from_standard_input(model):
    prompt = os.urandom(1_000_000)
    done = run("generate", "-", "--model", model, "--max-new", "5", input=prompt)
    assert done.returncode == 0
    assert done.stdout.startswith(prompt) and len(done.stdout) == len(prompt) + 5


def test_text_streams_in_whole_characters(model):
    from futurefill_rs.cli.terminal import Text

    class Stream(io.RawIOBase):
        def __init__(self):
            self.parts = []

        def write(self, data):
            self.parts.append(bytes(data))
            return len(data)

    stream = Stream()
    text = Text(stream)
    for byte in "aé€😀".encode() + b"\xff\xc3":
        text.write(bytes([byte]))
    text.finish()
    assert stream.parts == [b"a", "é".encode(), "€".encode(), "😀".encode(), b"\xff", b"\xc3"]


def test_a_reader_that_goes_away_is_one_line(model):
    with subprocess.Popen(
        [*COMMAND, "generate", "In the", "--model", model, "--max-new", "100000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout.read(20)
        process.stdout.close()
        assert "went away" in one_line(process.stderr.read())
        assert process.wait(60) == 2


def test_ctrl_c_is_one_line(model):
    with subprocess.Popen(
        [*COMMAND, "generate", "In the", "--model", model, "--max-new", "100000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A script run in the background ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert "interrupted" in one_line(process.stderr.read())
        assert process.wait(60) == 2


@pytest.mark.parametrize("module", ["numpy", "torch"])
@pytest.mark.parametrize("exit_code", [0, 1])
def test_ctrl_c_during_an_import_is_one_line(tmp_path, module, exit_code):
    """A stand-in for the library interrupts its own import, and swallows or changes what that raises."""
    (tmp_path / module).mkdir()
    (tmp_path / module / "__init__.py").write_text(
        "import os, signal, time\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(5)\n"
        "except BaseException as error:\n"
        f"    raise SystemExit({exit_code}) from error\n"
    )
    done = run(
        "generate",
        "In the",
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.returncode == 2 and not done.stdout
    assert one_line(done.stderr) == "futurefill: interrupted\n"


def test_ctrl_c_in_a_program_that_imports_the_package_stays_pythons():
    program = (
        "import signal, futurefill_rs; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert done.stdout == b"True\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("info",), ("--help",), ("generate", "--help"), ("--version",)])
def test_a_full_disk_is_one_line(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert "No space left" in one_line(done.stderr)


@pytest.mark.parametrize("arguments", ["info", "--help", "generate a"])
def test_a_closed_standard_output_is_one_line(arguments):
    command = " ".join([*COMMAND, arguments, ">&-"])
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, timeout=120)
    assert done.returncode == 2
    assert "standard output is closed" in one_line(done.stderr)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), "COMMAND"),
        (("sing",), "sing"),
        (("generate",), "PROMPT"),
        (("generate", "a", "b"), "unrecognized"),
        (("generate", "a", "--max-new", "-1"), "--max-new"),
        (("generate", "a", "--max-new", "1.5"), "--max-new"),
        (("generate", "a", "--max-new", "1" + "0" * 30), "--max-new"),
        (("generate", "a", "--temperature", "-1"), "--temperature"),
        (("generate", "a", "--temperature", "nan"), "--temperature"),
        (("generate", "a", "--temperature", "inf"), "--temperature"),
        (("generate", "a", "--temperature", "hot"), "--temperature"),
        (("generate", "a", "--top-k", "0"), "--top-k"),
        (("generate", "a", "--top-p", "0"), "--top-p"),
        (("generate", "a", "--top-p", "1.5"), "--top-p"),
        (("generate", "a", "--min-p", "-0.1"), "--min-p"),
        (("generate", "a", "--min-p", "x"), "--min-p"),
        (("generate", "a", "--repetition-penalty", "0"), "--repetition-penalty"),
        (("generate", "a", "--repetition-penalty", "inf"), "--repetition-penalty"),
        (("generate", "a", "--stop", ""), "--stop"),
        (("generate", "a", "--max-new", str(2**63 - 1)), "--max-new: expected at most"),
        (("generate", "a", "--seed", "-5"), "--seed"),
        (("generate", "a", "--seed", "x\ny"), "--seed"),
        (("generate", "a", "--method", "magic"), "magic"),
        (("generate", "a", "--device", "tpu"), "tpu"),
        (("generate", "a", "--max", "5"), "--max"),
        (("generate", "a", "--model", "no/such/folder"), "no/such/folder"),
        (("bench", "--channels", "0"), "--channels"),
        (("bench", "--length", "-4"), "--length"),
        (("bench", "--methods", "auto,magic"), "magic"),
        (("bench", "--methods", "8:1"), "fan"),
        (("bench", "--methods", ""), "--methods"),
        (("bench", "--workers", "0"), "--workers"),
        (("bench", "--channels", "1000000000", "--length", "1000000000"), "memory"),
        (("info", "more"), "more"),
    ],
)
def test_errors_are_one_line_that_names_the_argument(capsysbinary, arguments, words):
    assert words in failure(capsysbinary, *arguments)


def test_nothing_is_written_when_something_fails(capsysbinary, dna, monkeypatch):
    from futurefill_rs._generate import one

    for arguments in (("ACGU", "--model", dna), (">x\nAC\n>y\nGT", "--model", dna)):
        assert main(["generate", *arguments]) == 2
        assert not capsysbinary.readouterr().out

    def fail(*arguments):
        raise MemoryError("cannot allocate 9 bytes")

    monkeypatch.setattr(one, "read_prompt", fail)
    assert main(["generate", "ACGT", "--model", dna]) == 2
    captured = capsysbinary.readouterr()
    assert not captured.out
    assert captured.err.startswith(b"futurefill: generate: --max-new: expected")
    assert b"cannot allocate 9 bytes" in captured.err and captured.err.count(b"\n") == 1


def test_names_are_escaped_before_they_reach_a_terminal(capsysbinary, tmp_path):
    bad = str(tmp_path / "\x1b[2Jmodel\x07\n\u202egone")
    message = failure(capsysbinary, "generate", "a", "--model", bad)
    assert all(c.isprintable() for c in message[:-1])
    assert "\\x1b[2Jmodel\\x07" in message


DNA = dict(
    d_model=16,
    n_layer=2,
    d_inner=32,
    vocab_size=12,
    pad_vocab_size_multiple=8,
    layer=dict(emb_dim=5, filter_order=16, l_max=48, w=10),
)


@pytest.fixture(scope="module")
def dna(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("dna")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models.HyenaDNA(DNA).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("ACGTNACG", "ACGTNACG"),
        ("ACGTNACG\n", "ACGTNACG"),
        ("acgtnACG\r\n", "acgtnACG"),
        (">chr1 test\nACGTN\nacg\n\n", ">chr1 test\nACGTN\nacg"),
        ("ACGT N\nACG", "ACGT N\nACG"),
    ],
)
def test_dna_comes_in_any_case_from_pipes_and_as_fasta(dna, prompt, shown):
    options = ("--model", dna, "--max-new", "20", "--seed", "1")
    plain = run("generate", "ACGTNACG", *options)
    assert plain.returncode == 0 and plain.stdout.startswith(b"ACGTNACG") and len(plain.stdout) == 28
    done = run("generate", "-", *options, input=prompt.encode())
    assert done.returncode == 0
    assert done.stdout == shown.encode() + plain.stdout[8:]


def test_a_fasta_header_alone_keeps_its_line(capsysbinary, dna):
    assert main(["generate", ">chr1\n", "--model", dna, "--max-new", "6", "--seed", "1"]) == 0
    captured = capsysbinary.readouterr()
    header, bases = captured.out.split(b"\n")
    assert header == b">chr1" and len(bases) == 6 and set(bases) <= set(b"ACGTN")
    assert b"empty prompt" in captured.err


def test_the_command_draws_as_the_library_does(generate, model):
    import futurefill_rs as ff

    loaded = models.load(model)
    ids = torch.tensor([list(b"In the")])
    options = dict(top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, temperature=0.7, seed=3)
    flags = [str(x) for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    want = bytes(ff.generate(loaded, ids, 50, **options)[0].tolist())
    assert generate("In the", "--max-new", "50", *flags) == want


def test_stop_strings_end_the_text_before_them(generate):
    options = ("--max-new", "60", "--seed", "1")
    whole = generate("In the", *options)
    new = whole[6:]
    for at, length in ((0, 1), (7, 1), (20, 3), (59, 1), (50, 10)):
        stop = new[at : at + length]
        want = whole[: 6 + new.index(stop)]
        assert generate("In the", *options, "--stop", os.fsdecode(stop)) == want
        assert generate("In the", *options, "--stop", "never comes", "--stop", os.fsdecode(stop)) == want
    # What only begins like a stop string is written in the end.
    assert generate("In the", *options, "--stop", os.fsdecode(new[-3:] + b"more")) == whole


def test_stop_strings_are_held_back_and_nothing_else():
    from futurefill_rs.cli.terminal import UntilStop

    stop = UntilStop([b"abab", b"bc"])
    assert [stop(bytes([byte])) for byte in b"xabaxabb"] == [b"x", b"", b"", b"", b"abax", b"", b"", b"ab"]
    assert stop.rest() == b"b" and stop.found is None
    assert [stop(bytes([byte])) for byte in b"aababz"] == [b"", b"a", b"", b"", b"", b""]
    assert stop.found == b"abab" and stop.rest() == b""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_is_shown_where_a_terminal_waits(monkeypatch, model, capsysbinary):
    from futurefill_rs.cli import terminal

    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    monkeypatch.setattr(terminal, "PAUSE", 0.0)
    assert main(["generate", "In the", "--model", model, "--max-new", "30"]) == 0
    shown = stderr.getvalue()
    assert re.search(r"reading a prompt of \d+ ids \[#+\] 100%", shown)
    assert re.search(r"adding 30 bytes \[#+\] 100%", shown)
    *bars, closing = shown.split(terminal.CLEAR)
    assert len(bars) > 30 and closing.startswith("futurefill: 30 tokens") and closing.count("\n") == 1
    assert capsysbinary.readouterr().out.startswith(b"In the")


def test_no_bar_before_a_second_or_without_a_terminal(monkeypatch, generate):
    from futurefill_rs.cli import terminal

    generate("In the", "--max-new", "5")
    assert "[" not in generate.notes.err.decode()
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = terminal.Progress("waiting")
    progress(1, 2)
    progress.clear()
    assert not stderr.getvalue()


def test_a_damaged_model_is_one_line(capsysbinary, tmp_path):
    (tmp_path / "config.json").write_text("{")
    assert str(tmp_path) in failure(capsysbinary, "generate", "a", "--model", str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "kind": "flash_stu_lm"}))
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 100)
    assert str(tmp_path) in failure(capsysbinary, "generate", "a", "--model", str(tmp_path))


def test_a_model_over_words_is_refused(capsysbinary, tmp_path):
    models.FlashSTU({**CONFIG, "vocab_size": 1000}).save(tmp_path)
    assert "1000 ids" in failure(capsysbinary, "generate", "a", "--model", str(tmp_path))


def test_a_missing_device_is_one_line(capsysbinary, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in failure(capsysbinary, "generate", "a", "--model", model, "--device", "cuda")


def test_generate_without_torch_names_the_extra(capsysbinary, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "futurefill_rs[torch]" in failure(capsysbinary, "generate", "a")


@pytest.mark.parametrize("command", [(), ("generate",), ("score",), ("bench",), ("info",)])
def test_help(capsysbinary, command):
    assert main([*command, "--help"]) == 0
    captured = capsysbinary.readouterr()
    assert captured.out.startswith(b"usage: futurefill") and not captured.err


def test_version(capsysbinary):
    import futurefill_rs

    assert main(["--version"]) == 0
    assert capsysbinary.readouterr().out.decode() == f"futurefill {futurefill_rs.__version__}\n"


def test_info_shows_the_configuration(capsysbinary):
    assert main(["info"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert "instruction set" in out and "built-in model" in out.lower()


def test_bench_records(capsysbinary):
    assert (
        main(["bench", "--channels", "3", "--length", "300", "--methods", "auto,epoched,16:4", "--json"]) == 0
    )
    records = json.loads(capsysbinary.readouterr().out)
    assert [record["method"] for record in records] == ["auto", "epoched", "16:4", "direct", "offline-fft"]
    for record in records:
        assert (record["channels"], record["length"], record["workers"]) == (3, 300, 1)
        assert record["ns_per_position_channel"] > 0
        online = record["method"] != "offline-fft"
        assert (record["worst_step_ms"] is not None) == (record["state_bytes"] is not None) == online
    assert records[2]["schedule"] == "Schedule(base=16, fans=(4,))"


def test_bench_table(capsysbinary):
    assert main(["bench", "--channels", "2", "--length", "50"]) == 0
    out = capsysbinary.readouterr().out.decode()
    for name in ("auto", "naive", "epoched", "continuous", "direct", "offline-fft"):
        assert re.search(rf"^{name} ", out, re.M)


def test_bench_without_torch(capsysbinary, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["bench", "--channels", "2", "--length", "50", "--methods", "auto", "--json"]) == 0
    offline = json.loads(capsysbinary.readouterr().out)[-1]
    assert offline["ns_per_position_channel"] is None and "torch" in offline["note"]


def test_a_long_direct_sum_is_sampled_and_says_so(monkeypatch):
    monkeypatch.setattr(bench, "SAMPLED_ABOVE", 0.0)
    direct = bench.run(2, 2000, [], rounds=1)[0]
    assert direct.positions == bench.WINDOWS * bench.STEPS_PER_WINDOW
    assert "64 of 2000 positions" in direct.note
    assert direct.ns_per_position_channel > 0


def test_a_run_past_the_limit_is_broken_off_and_says_so():
    record = bench.run(2, 5000, ["8"], limit=0.0, rounds=2)[0]
    assert record.positions < record.length and str(record.positions) in record.note


def test_filters_of_the_closed_loop_neither_die_out_nor_grow():
    import futurefill_rs as ff
    import numpy as np

    cache = ff.plan(bench.closed_loop_filters(4, 500), 500).new_cache()
    u = np.ones(4, np.float32)
    for _ in range(500):
        u = cache.step(u)
    assert (u > 1e-4).all() and (u < 1).all()
