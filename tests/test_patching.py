"""patch(): what it finds, checks, binds and undoes, on a trainer made for it."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch

import dpo_kernels
from dpo_kernels import patching
from dpo_kernels.integrations import deepspeed_chat
from dpo_kernels.patching import Seam, Trainer, patch

SOURCE = {
    "__init__": '__version__ = "3.1"',
    "utils": """
        def score(logits, labels):
            return "theirs"

        class Model:
            def forward(self, batch):
                return "theirs"
        """,
    # what imports the name keeps a copy of it
    "loss": "from .utils import score",
    "late": "from .utils import score",
}


def _ours(*args):
    return "ours"


def _seams(version):
    return [
        Seam("a_trainer.utils:score", lambda _: _ours, ("logits", "labels"), "faster"),
        Seam("a_trainer.utils:Model.forward", lambda _: _ours, ("self", "batch"), "smaller"),
    ]


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """A package ``a_trainer`` that is installed, and the module that declares its seams."""
    import textwrap

    package = tmp_path / "a_trainer"
    package.mkdir()
    for name, source in SOURCE.items():
        (package / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    adapter = types.ModuleType("dpo_kernels.integrations.a_trainer")
    adapter.seams = _seams
    monkeypatch.setitem(sys.modules, adapter.__name__, adapter)
    known = Trainer("a_trainer", "a-trainer", "a_trainer")
    monkeypatch.setattr(patching, "TRAINERS", {"a_trainer": known})
    yield adapter
    active = patching.active("a_trainer")
    if active is not None:
        active.undo()
    for name in [name for name in sys.modules if name.partition(".")[0] == "a_trainer"]:
        del sys.modules[name]


def _module(name: str):
    return __import__(f"a_trainer.{name}", fromlist=["score"])


def test_every_copy_is_replaced_and_put_back(trainer):
    loss, utils = _module("loss"), _module("utils")
    own, forward = utils.score, utils.Model.forward
    with patch("a_trainer") as patched:
        assert loss.score is utils.score is _ours
        assert utils.Model.forward is _ours
        # imported while the patch is there
        assert _module("late").score is _ours
    assert loss.score is utils.score is _module("late").score is own
    assert utils.Model.forward is forward
    patched.undo()
    assert utils.score is own


def test_it_says_what_it_replaced(trainer, capsys):
    patched = patch("a_trainer")
    text = str(patched)
    assert "a_trainer 3.1: replaced" in text
    assert "a_trainer.utils:score: faster" in text and "Model.forward: smaller" in text
    assert text in repr(patched)
    assert text in capsys.readouterr().err
    patched.undo()
    assert "put back" in str(patched)
    with patch("a_trainer", verbose=False):
        assert not capsys.readouterr().err


def test_a_patch_inside_a_patch_undoes_nothing(trainer):
    with patch("a_trainer") as outer:
        with patch("a_trainer") as inner:
            assert inner is not outer and "before" in str(inner)
        assert _module("utils").score is _ours
    assert _module("utils").score is not _ours


def test_whole_or_not_at_all(trainer):
    """A seam that moved leaves the others as they are."""
    for where, parameters, message in (
        ("a_trainer.utils:score", ("logits",), r"takes logits, labels; expected logits$"),
        ("a_trainer.utils:gone", (), r"a_trainer 3.1 has no a_trainer.utils.gone to replace"),
        ("a_trainer.utils:Gone.forward", (), r"no a_trainer.utils.Gone.forward to replace"),
        ("a_trainer.gone:score", (), r"a_trainer.gone cannot be imported"),
    ):
        moved = Seam(where, lambda _: _ours, parameters, "")
        trainer.seams = lambda version, moved=moved: [*_seams(version), moved]
        with pytest.raises(ImportError, match=message):
            patch("a_trainer")
        assert _module("utils").score is not _ours


def test_an_optional_seam_may_be_missing_but_not_every_one(trainer):
    gone = Seam("a_trainer.utils:gone", lambda _: _ours, (), "", optional=True)
    trainer.seams = lambda version: [*_seams(version), gone]
    with patch("a_trainer") as patched:
        assert "as it was: a_trainer 3.1 has no a_trainer.utils.gone" in str(patched)
    trainer.seams = lambda version: [gone]
    with pytest.raises(ImportError, match=r"found nothing to patch.*utils.gone"):
        patch("a_trainer")


def test_another_patch_is_refused_below_and_above(trainer, monkeypatch):
    utils = _module("utils")

    def other(logits, labels):
        pass

    with monkeypatch.context() as below:
        below.setattr(utils, "score", other)
        with pytest.raises(RuntimeError, match=r"not a_trainer's own.*other"):
            patch("a_trainer")
    patched = patch("a_trainer")
    with monkeypatch.context() as above:
        above.setattr(utils, "score", other)
        with pytest.raises(RuntimeError, match=r"utils:score was bound again"):
            patched.undo()
        assert utils.Model.forward is _ours
    patched.undo()


def test_what_is_ours_already_is_left(trainer):
    _module("utils").score = dpo_kernels.sequence_logps
    with patch("a_trainer") as patched:
        assert [binding.name for binding in patched.bindings] == ["forward"]
    assert _module("utils").score is dpo_kernels.sequence_logps


def test_every_installed_trainer(trainer, monkeypatch):
    known = patching.TRAINERS
    missing = Trainer("not_installed", "not-installed", "not_installed")
    monkeypatch.setattr(patching, "TRAINERS", {"not_installed": missing, **known})
    with patch() as patched:
        assert "a_trainer 3.1" in str(patched)
        assert _module("utils").score is _ours
    assert _module("utils").score is not _ours
    # a second trainer that somebody else has patched: the first is put back
    other = types.ModuleType("dpo_kernels.integrations.other")
    other.seams = lambda version: [Seam("a_trainer.loss:score", lambda _: _ours, (), "", "other")]
    monkeypatch.setitem(sys.modules, other.__name__, other)
    second = {"other": Trainer("a_trainer", "a-trainer", "other")}
    monkeypatch.setattr(patching, "TRAINERS", {**known, **second})
    loss = _module("loss")
    loss.score = lambda logits, labels: None
    with pytest.raises(RuntimeError, match=r"a_trainer.loss.score is not other's own"):
        patch()
    assert _module("utils").score is not _ours and patching.active("a_trainer") is None
    monkeypatch.setattr(patching, "TRAINERS", {"not_installed": missing, **known})
    trainer.seams = lambda version: [Seam("a_trainer.utils:gone", lambda _: _ours, (), "")]
    with pytest.raises(ImportError, match=r"nothing to patch.*a_trainer.utils.gone"):
        patch()
    monkeypatch.setattr(patching, "TRAINERS", {"not_installed": missing})
    with pytest.raises(ImportError, match=r"none of not_installed is installed"):
        patch()


def test_wrong_calls():
    with pytest.raises(ValueError, match=r"trainer: expected one of trl, .*got 'tlr'"):
        patch("tlr")
    with pytest.raises(ValueError, match="module: only"):
        patch("trl", module=sys)


def test_a_trainer_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(patching.TRAINERS, "trl", Trainer("no_trl_here", "trl", "trl_seams"))
    with pytest.raises(ImportError, match=r"needs no_trl_here: pip install trl"):
        patch("trl")


def test_a_script_that_defines_the_function_itself(monkeypatch):
    """DeepSpeed-Chat's main.py: the name is set where the script looks it up."""
    script = types.ModuleType("main")
    source = (
        "def get_batch_logps(logits, input_ids, label_mask): pass\n"
        "def main(): return get_batch_logps"
    )
    exec(source, vars(script))
    own, ours = script.main(), deepspeed_chat.get_batch_logps
    with patch("deepspeed_chat", module=script):
        assert script.main() is deepspeed_chat.get_batch_logps
    assert script.main() is own and deepspeed_chat.get_batch_logps is ours
    # by default, the program that runs
    monkeypatch.setitem(sys.modules, "__main__", script)
    with patch("deepspeed_chat"):
        assert script.main() is deepspeed_chat.get_batch_logps
    with pytest.raises(ImportError, match=r"no torch.get_batch_logps to replace"):
        patch("deepspeed_chat", module=torch)


def test_no_trainer_is_imported_before_the_call():
    code = (
        "import sys, dpo_kernels, dpo_kernels.patching as p\n"
        "packages = {t.package for t in p.TRAINERS.values()} - {''}\n"
        "print([m for m in sys.modules if m.partition('.')[0] in packages\n"
        "       or m.startswith('dpo_kernels.integrations')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", patching.TRAINERS)
def test_every_trainer_declares_its_seams(name):
    trainer = patching.TRAINERS[name]
    adapter = __import__(f"dpo_kernels.integrations.{trainer.adapter}", fromlist=["seams"])
    seams = adapter.seams("99.0" if trainer.package else None)
    assert seams and any(not seam.optional for seam in seams)
    for seam in seams:
        assert seam.gain and callable(seam.replace) and ":" in seam.where
