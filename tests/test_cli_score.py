"""`futurefill score`: rows of what the library says, from every sort of file; errors are one line."""

import gzip
import io
import os
import subprocess
import sys

import pytest
import torch
from futurefill_rs import models
from futurefill_rs.cli import main
from models_common import DNA, STRIPED_2

COLUMNS = "id\tlength\tlog_likelihood\tmean_log_likelihood\tperplexity\tmean_entropy"
FASTA = b">first of all\nGATTACA\ngatt aca\n\n>second\r\nACGTN\r\n"
SEQUENCES = ["GATTACAGATTACA", "ACGTN"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, model in {
            "dna": models.HyenaDNA(DNA),
            "evo": models.StripedHyena2({**STRIPED_2, "vocab_size": 512}),
        }.items():
            made[name] = str(tmp_path_factory.mktemp(name))
            model.save(made[name])
    return made


@pytest.fixture
def score(folders, capsysbinary, tmp_path, monkeypatch):
    """Runs `score` in this process on a file with some content; returns its rows."""

    def run(content, *options, model="dna", name="file.fa"):
        if name == "-":
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        else:
            (tmp_path / name).write_bytes(content)
            name = str(tmp_path / name)
        status = main(["score", name, "--model", folders[model], *options])
        captured = capsysbinary.readouterr()
        if status:
            message = captured.err.decode()
            assert status == 2 and message.count("\n") == 1 and not captured.out
            return message
        header, *rows = captured.out.decode().splitlines()
        assert header == COLUMNS and not captured.err
        return [row.split("\t") for row in rows]

    return run


def numbers(row):
    return [float(cell) for cell in row[2:]]


@pytest.mark.parametrize("name", ["dna", "evo"])
@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("strands", [False, True])
def test_rows_are_what_the_library_says(score, folders, name, begin, strands):
    flags = ["--begin"] * begin + ["--reverse-complement"] * strands
    rows = score(FASTA, *flags, model=name)
    model, options = models.load(folders[name]), {"begin": begin, "reverse_complement": strands}
    assert [row[:2] for row in rows] == [["first", "14"], ["second", "5"]]
    for row, text in zip(rows, SEQUENCES, strict=True):
        mean = float(model.score(text, reduce="mean", **options))
        want = [float(model.score(text, reduce="sum", **options)), mean, float(torch.tensor(-mean).exp())]
        want.append(float(model.entropies(text, reduce="mean", **options)))
        assert numbers(row) == pytest.approx(want, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["-", "file.txt"])
@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, lambda x: gzip.compress(x[:9]) + gzip.compress(x[9:])]
)
def test_files_of_every_sort(score, name, compress):
    want = [row[1:] for row in score(FASTA)]
    assert [row[1:] for row in score(compress(FASTA), name=name)] == want
    lines = score(compress(b"\nGATTACAGATTACA\n acgtn \n\n"), name=name)
    assert [row[0] for row in lines] == ["2", "3"] and [row[1:] for row in lines] == want
    assert score(compress(b"ACGTN"), name=name)[0][1:] == want[1]


def test_many_sequences_keep_their_order(score, folders):
    texts = ["ACGT"[i % 4] * (1 + 7 * i % 40) for i in range(50)]
    rows = score(
        "".join(f">{i}\n{text}\n" for i, text in enumerate(texts)).encode(), "--batch-size", "3", "--begin"
    )
    assert [int(row[0]) for row in rows] == list(range(50))
    want = models.load(folders["dna"]).score(texts, reduce="sum", begin=True)
    assert [numbers(row)[0] for row in rows] == pytest.approx(want.tolist(), abs=1e-3)


def test_one_base_without_a_beginning_has_no_mean(score):
    ((_, length, total, *rest),) = score(b"A\n")
    assert (length, total, set(rest)) == ("1", "0.000000", {"nan"})


def test_no_sequences_are_no_rows(score):
    assert score(b"\n\n") == []


def test_ambiguous_letters(score):
    assert "column 3: expected DNA (ACGTN), got 'R'" in score(b"ACRT\n")
    assert score(b"ACRT\n", model="evo")[0][1] == "4"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b">a\nACGT\nAC GU\n", "file.fa: line 3, column 5: expected DNA (ACGTN), got 'U'"),
        (b"ACGT\n\xc3\xa9\n", "file.fa: line 2, column 1: expected DNA (ACGTN), got 'é'"),
        (b"AC\xff\n", "line 1, column 3: expected DNA"),
        (b"ACGT\n>a\nACGT", "line 2, column 1: expected DNA (ACGTN), got '>'"),
        (b">a\nAC-GT*\n", "line 2, column 3: expected DNA (ACGTN), got '-'"),
        (b">a\n>b\nACGT\n", "file.fa: line 1: expected a sequence after this header, got none"),
        (b">a\nA\n>b\n\n", "file.fa: line 3: expected a sequence after this header, got none"),
        (gzip.compress(FASTA)[:-9], "file.fa: "),
        (b"\x1f\x8b damaged", "file.fa: "),
    ],
)
def test_what_is_no_dna_is_one_line_before_any_row(score, content, words):
    message = score(content)
    assert message.startswith("futurefill: score: ") and words in message


def test_what_the_command_cannot_do_is_one_line(folders, capsysbinary, tmp_path):
    def message(*arguments):
        assert main(["score", *arguments]) == 2
        captured = capsysbinary.readouterr()
        assert captured.err.count(b"\n") == 1 and not captured.out
        return captured.err.decode()

    file = tmp_path / "x"
    file.write_bytes(b"ACGT")
    assert "score: no/such/file: No such file" in message("no/such/file", "--model", folders["dna"])
    assert f"score: {tmp_path}: Is a directory" in message(str(tmp_path), "--model", folders["dna"])
    assert "--model" in message(str(file))
    assert "score: --model nowhere: " in message(str(file), "--model", "nowhere")
    models.FlashSTU(dict(n_embd=8, n_layers=1, seq_len=8, vocab_size=256, mlp_scale=1, num_eigh=2)).save(
        tmp_path / "text"
    )
    assert "--begin: expected a model with" in message(
        str(file), "--model", str(tmp_path / "text"), "--begin"
    )


def test_pipes_are_read_once(folders, tmp_path):
    command = [sys.executable, "-m", "futurefill_rs.cli", "score", "/dev/fd/0", "--model", folders["dna"]]
    done = subprocess.run(
        command, input=FASTA, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3, done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_tells_how_far_it_is(score, monkeypatch, folders, tmp_path, capsysbinary):
    from futurefill_rs.cli import terminal

    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(terminal, "PATIENCE", 0.0)
    monkeypatch.setattr(terminal, "PAUSE", 0.0)
    (tmp_path / "x").write_bytes(FASTA * 20)
    options = ["--model", folders["dna"], "--batch-size", "2", "--reverse-complement"]
    assert main(["score", str(tmp_path / "x"), *options]) == 0
    shown = stderr.getvalue()
    assert "scoring 40 sequences [###" in shown and shown.endswith(terminal.CLEAR)
    assert len(capsysbinary.readouterr().out.splitlines()) == 41


def test_evo_prompts_are_dna_or_plain_bytes(folders, capsysbinary):
    def generated(prompt):
        options = ["--model", folders["evo"], "--max-new", "12", "--seed", "4"]
        assert main(["generate", prompt, *options]) == 0
        return capsysbinary.readouterr().out

    plain = generated("ACGTACGT")
    assert plain.startswith(b"ACGTACGT")
    assert generated(">chr1 x\nACGT\nacgt\n") == b">chr1 x\nACGT\nacgt" + plain[8:]
    tagged = generated("|d__Bacteria|ACGT\n")
    assert tagged.startswith(b"|d__Bacteria|ACGT\n")
    assert len(generated("")) <= 12


def test_the_token_between_sequences_ends_a_text(folders, capsysbinary, monkeypatch):
    from futurefill_rs.cli import generate

    monkeypatch.setattr(generate, "_sampler", lambda *arguments: Always([65, 67, 0, 71]))
    assert main(["generate", "AC", "--model", folders["evo"], "--max-new", "4"]) == 0
    assert capsysbinary.readouterr().out == b"ACAC"


class Always:
    """Draws the same ids whatever the logits are."""

    def __init__(self, ids):
        self._ids = iter(ids)

    def draw(self, logits):
        return torch.tensor([next(self._ids)])
