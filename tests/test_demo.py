"""The demo's parts, and all of it end to end on a small scale."""

from __future__ import annotations

import json
import re
import struct
import sysconfig
from pathlib import Path

import pytest
import torch

from dpo_kernels.cli.demo import REQUIRED_ACCURACY_QUICK
from dpo_kernels.cli.problems import IGNORE
from dpo_kernels.demo.corpus import Documented, docstring_corpus, documented_functions
from dpo_kernels.demo.data import DataError, PreferencePair, read_preferences
from dpo_kernels.demo.plot import make_figure
from dpo_kernels.demo.tokenizer import Tokenizer
from dpo_kernels.demo.training import Run, batches, encode, preferred
from tests.test_cli import run_cli


def write(path, *lines) -> None:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")


def said(role: str, content) -> dict:
    return {"role": role, "content": content}


STANDARD = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
CONVERSATIONAL = {
    "prompt": [said("user", "Sky?")],
    "chosen": [said("assistant", "Blue.")],
    "rejected": [said("assistant", "Green.")],
}
SPOKEN = PreferencePair("<user>\nSky?\n", "<assistant>\nBlue.\n", "<assistant>\nGreen.\n")


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (STANDARD, PreferencePair("The sky is", " blue.", " green.")),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is black.", "score": 3},
            PreferencePair("The sky is ", "blue.", "black."),
        ),
        (CONVERSATIONAL, SPOKEN),
        (
            {
                "prompt": None,
                "chosen": [said("user", "Sky?"), said("assistant", "Blue.")],
                "rejected": [said("user", "Sky?"), said("assistant", "Green.")],
            },
            SPOKEN,
        ),
        (
            {
                **CONVERSATIONAL,
                "prompt": [said("user", [{"type": "text", "text": "Sky?"}])],
            },
            SPOKEN,
        ),
    ],
    ids=["standard", "implicit prompt", "conversational", "implicit conversational", "parts"],
)
def test_reader_takes_trl_formats(tmp_path, row, pair):
    path = tmp_path / "pairs.jsonl"
    write(path, row, "", row)
    assert read_preferences(path) == [pair, pair]


def test_reader_takes_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(STANDARD).encode() + b"\r\n")
    assert len(read_preferences(path)) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "not JSON at column 2"),
        ("[1, 2]", "expected a JSON object, got a list"),
        ({"prompt": "a", "chosen": "b"}, "'rejected' is missing; found 'prompt', 'chosen'"),
        ({**STANDARD, "chosen": None}, "'chosen': expected text or messages, got null"),
        ({**STANDARD, "chosen": ""}, "'chosen': nothing in it"),
        ({**STANDARD, "chosen": 3}, "chosen is a number"),
        ({**CONVERSATIONAL, "prompt": "Sky?"}, "prompt is a string, chosen is a list"),
        ({**CONVERSATIONAL, "chosen": ["Blue."]}, "chosen[0]: expected a message, got a string"),
        ({**CONVERSATIONAL, "chosen": [{"role": "user"}]}, "chosen[0]: 'content' is missing"),
        ({**CONVERSATIONAL, "chosen": [said("assistant", 1)]}, "chosen[0]: content is a number"),
        ({**CONVERSATIONAL, "rejected": []}, "'rejected': nothing in it"),
        (
            {"chosen": "a b ", "rejected": "a b "},
            "'chosen': nothing in it after the prompt that both answers share",
        ),
    ],
)
def test_reader_names_bad_lines_by_number(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    write(path, STANDARD, "", line, STANDARD, line)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:3: ")
    assert second.startswith(f"{path}:5: ")
    assert message in first


def test_reader_rejects_other_encodings_missing_and_empty_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(STANDARD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl:2: not UTF-8 at byte 0"):
        read_preferences(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="no pairs in it"):
        read_preferences(path)
    with pytest.raises(DataError, match="No such file"):
        read_preferences(tmp_path / "nothing.jsonl")


def test_demo_stops_at_bad_data_before_it_starts(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, *[STANDARD] * 6, "{")
    done = run_cli("demo", "--quick", "--data", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "pairs.jsonl:7: not JSON" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def functions() -> list[Documented]:
    return list(documented_functions(Path(sysconfig.get_paths()["stdlib"])))


@pytest.fixture
def read_once(monkeypatch, functions):
    """The standard library is parsed once for several corpora."""
    monkeypatch.setattr("dpo_kernels.demo.corpus.documented_functions", lambda root: functions)


@pytest.fixture
def corpus(read_once):
    return docstring_corpus()


def test_corpus_holds_out_whole_modules(corpus):
    assert not corpus.train_modules & corpus.held_out_modules
    assert len(corpus.held_out_modules) >= 5
    assert len(corpus.train) > 1000 < 10 * len(corpus.held_out)
    # a docstring that two modules share would leak from one side to the other
    chosen = [pair.chosen for pair in (*corpus.train, *corpus.held_out)]
    assert len(set(chosen)) == len(chosen)
    trained_on = {pair.chosen for pair in corpus.train}
    assert not any(pair.rejected in trained_on for pair in corpus.held_out)


def test_corpus_corrupts_as_it_says(corpus):
    held_out = {pair.chosen for pair in corpus.held_out}
    for pair in corpus.held_out:
        assert pair.chosen != pair.rejected
        assert pair.prompt.startswith("def ")
        if pair.kind == "shuffled words":
            assert sorted(pair.chosen.split()) == sorted(pair.rejected.split())
        else:
            assert pair.kind == "another's docstring"
            assert pair.rejected in held_out
    assert {pair.kind for pair in corpus.held_out} == {"shuffled words", "another's docstring"}


def test_corpus_is_the_same_every_time(corpus, monkeypatch):
    assert docstring_corpus(seed=1).held_out_modules != corpus.held_out_modules
    monkeypatch.undo()
    assert docstring_corpus() == corpus


def test_tokenizer_gives_back_every_text():
    texts = ["Return the number of tokens, the number of words.", "naïve ünïcode\t\n  λ 1234 ☃"]
    tokenizer = Tokenizer.train(texts * 3, 300)
    assert tokenizer.vocab_size == 300
    for text in (*texts, "nothing like it, ¿right?"):
        tokens = tokenizer.encode(text)
        assert tokenizer.decode(tokens) == text
        assert max(tokens) < tokenizer.vocab_size
    assert len(tokenizer.encode(texts[0])) < len(texts[0].encode()) / 2
    assert Tokenizer.train(["ab"], 300).vocab_size == 257


def test_encoding_scores_answers_only_and_keeps_both_when_long():
    tokenizer = Tokenizer([])
    long, short = PreferencePair("p" * 90, "c" * 90, "r"), PreferencePair("p", "cc", "rrr")
    split = encode([long, short], tokenizer, 20, "cpu")
    spoken = [
        bytes(row[label != IGNORE][:-1].tolist())
        for row, label in zip(split.tokens[1:], split.labels[1:], strict=True)
    ]
    assert spoken == [b"cc", b"r", b"rrr"]
    assert bytes(split.labels[0][split.labels[0] != IGNORE].tolist()) == b"c" * 10
    scored = split.labels != IGNORE
    assert torch.equal(split.labels[scored], split.tokens[scored])
    assert not scored[:, 0].any()
    assert split.cut == 1


def test_batches_show_every_pair_before_any_comes_again():
    split = encode([PreferencePair("p", "c", "r")] * 7, Tokenizer([]), 8, "cpu")
    seen = torch.cat(list(batches(split, 3, 7, seed=0)))
    for start in (0, 7, 14):
        assert sorted(seen[start : start + 7].tolist()) == list(range(7))


def test_a_tie_counts_half():
    chosen, rejected = torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 2.0])
    assert preferred(chosen, rejected).tolist() == [1.0, 0.5, 0.0]


def png_size(path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:24])


@pytest.mark.parametrize(
    "machine", ["a CPU, 2 threads", "Extraordinarily long processor name " * 7]
)
def test_the_title_of_the_picture_is_inside_it(machine):
    run = Run("plain", losses=[0.7, 0.6], accuracy={0: 0.5, 2: 0.7})
    model = "12.3 M parameters, byte-pair vocabulary of 8192, logits [64, 128, 8192]"
    figure = make_figure(f"Two losses\n{model}\n{machine}", (run, run), 0.7, {})
    figure.draw_without_rendering()
    (title,) = figure.texts
    inside = title.get_window_extent()
    assert inside.x0 >= 0 and inside.x1 <= figure.bbox.x1
    assert inside.y0 >= 0 and inside.y1 <= figure.bbox.y1


def test_demo_quick_end_to_end(tmp_path):
    """The whole main job; the small model has to reach 60%, the demo's own has to reach 75%."""
    done = run_cli("demo", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("1 of 4", "2 of 4", "all passed", "3 of 4", "4 of 4", "which is rounding"):
        assert text in done.stdout
    rows = re.findall(
        r"^\| (?:plain PyTorch|dpo_kernels) +\| +(\S+)% \| (\S+)% ", done.stdout, re.M
    )
    assert len(rows) == 2
    for before, after in rows:
        assert float(before) == 50.0
        assert float(after) >= 100 * REQUIRED_ACCURACY_QUICK
    width, height = png_size(tmp_path / "training.png")
    assert width > 1000 < 2 * height


def test_demo_takes_a_file_of_preferences(tmp_path):
    path = tmp_path / "pairs.jsonl"
    write(path, *[STANDARD, CONVERSATIONAL] * 10)
    done = run_cli("demo", "--quick", "--steps", "4", "--data", str(path), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 pairs to train on, 4 held out" in done.stdout
    assert (tmp_path / "training.png").exists()
