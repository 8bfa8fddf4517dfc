"""What agsel depends on inside of other packages: the table is of its own code, and what changed there is refused."""

from __future__ import annotations

import linecache
import shutil
import sys
import textwrap
from importlib import import_module, invalidate_caches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from agsel import upstream
from agsel.errors import RunError
from agsel.runs.trainer import ResumableTrainer
from tools import record_upstream

STAGE_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
TRAINER = "transformers.trainer:Trainer"
OVERRIDDEN = (
    "_get_dataloader",
    "_run_epoch",
    "_finalize_training",
    "_save_checkpoint",
    "_get_output_dir",
    "_evaluate",
    "_determine_best_metric",
)
EXAMPLE = '''
    @decorated(1)
    def method(self, number=2):
        """A docstring."""
        # a comment
        text = f"{number:>{self.width}} # no comment"

        def inner():
            "Another."
            return (text,
                    'a string')  # the end

        return inner() if number else """of
        several lines"""
'''
SAME = {
    "comment": ("# a comment", "# another"),
    "no comment": ("  # the end", ""),
    "docstring": ("A docstring.", "Another\n\n        of several lines."),
    "no docstring": ('        """A docstring."""\n', ""),
    "docstring of inner function": ('"Another."', "'''Yet another.'''"),
    "blank line": ("\n        return", "\n\n\n        return"),
    "line break": ("(text,\n                    'a string')", "(text, 'a string')"),
    "spaces": ("number=2", "number = 2"),
}
DIFFERENT = {
    "statement": ("else", "is None and self or"),
    "f-string": ("# no comment", "# a comment"),
    "field of f-string": ("self.width", "self.height"),
    "format of f-string": (":>", ":<"),
    "decorator": ("decorated(1)", "decorated(2)"),
    "no decorator": ("    @decorated(1)\n", ""),
    "default": ("number=2", "number=3"),
    "string": ("'a string'", "'a  string'"),
    "spaces inside a string": ("of\n        several", "of\n    several"),
    "indentation": ("\n        return inner()", "\n            return inner()"),
}


def test_the_table_is_what_agsels_code_depends_on_now() -> None:
    """If not: `python tools/record_upstream.py`, after reading what changed; see CONTRIBUTING.md."""
    now = record_upstream.record()
    assert entries(now) - entries(upstream.table()) == set(), "not in the table"
    assert upstream.table() == now


def entries(table: dict[str, Any]) -> set[tuple[str, str, str | None]]:
    """Module of agsel, name and checksum."""
    return {(module, *entry) for module, checksums in table["checksums"].items() for entry in checksums.items()}


@pytest.mark.parametrize(
    "name",
    [
        f"{STAGE_2}._update_scale",
        f"{STAGE_3}._update_scale",
        f"{STAGE_2}.get_param_comm_dtype",
        "deepspeed.runtime.utils:all_gather_dp_groups",
        "deepspeed.utils.groups:_get_data_parallel_group",
        *(f"{TRAINER}.{method}" for method in OVERRIDDEN),
        "trl.trainer.sft_trainer:SFTTrainer._save_checkpoint",
        f"{TRAINER}._prepare_for_training",
        f"{TRAINER}.set_initial_training_values",
        f"{TRAINER}.create_optimizer",
        f"{TRAINER}.get_optimizer_cls_and_kwargs",
        "transformers.integrations.deepspeed:deepspeed_load_checkpoint",
    ],
)
def test_private_parts_are_in_the_table(name: str) -> None:
    assert name in {entry for _, entry, _ in entries(upstream.table())}


def test_only_trl_may_lack_a_method() -> None:
    """Which it could put before the one of transformers; any other must have been found."""
    lacking = {name.rpartition(".")[0] for _, name, checksum in entries(upstream.table()) if checksum is None}
    assert lacking == {"trl.trainer.sft_trainer:SFTTrainer"}


@pytest.mark.parametrize("module", record_upstream.MODULES)
def test_only_what_the_code_does_not_name_is_listed_by_hand(module: str) -> None:
    known = import_module(module)
    assert record_upstream.listed_in(known) & record_upstream.found_in(known) == set()


@pytest.mark.parametrize("change", SAME)
def test_what_python_does_not_see_does_not_change_a_checksum(change: str) -> None:
    old, new = SAME[change]
    assert EXAMPLE.count(old) >= 1
    assert upstream.checksum(EXAMPLE.replace(old, new)) == upstream.checksum(EXAMPLE)


@pytest.mark.parametrize("change", DIFFERENT)
def test_what_python_sees_changes_a_checksum(change: str) -> None:
    old, new = DIFFERENT[change]
    assert EXAMPLE.count(old) >= 1
    assert upstream.checksum(EXAMPLE.replace(old, new)) != upstream.checksum(EXAMPLE)


def test_a_checksum_is_the_same_on_every_version_of_python() -> None:
    """Noted on 3.11, 3.12 and 3.13, between which f-strings became several tokens."""
    assert upstream.checksum(EXAMPLE) == "044e548f"


@pytest.mark.parametrize(
    "name",
    [
        "deepspeed.gone:function",
        "deepspeed.runtime.utils:gone",
        "deepspeed.runtime.engine:Gone.step",
        "deepspeed.runtime.engine:DeepSpeedEngine.gone",
        "deepspeed.runtime.engine:DeepSpeedEngine.add_module",  # of torch
    ],
)
def test_what_is_gone_has_no_checksum(name: str) -> None:
    assert upstream.checksum_of(name) is None


def test_a_method_may_be_inherited_inside_its_package() -> None:
    found = upstream.checksum_of("trl.trainer.sft_trainer:SFTTrainer.create_model_card")
    assert found == upstream.checksum_of("trl.trainer.base_trainer:_BaseTrainer.create_model_card") is not None


class Bare(ResumableTrainer):
    """A trainer that can be made resumable, and nothing else."""

    def __init__(self) -> None:
        self.callback_handler = SimpleNamespace(add_callback=lambda _: None)


def make_resumable() -> None:
    Bare().make_resumable(requests=None, run={}, group=None)  # type: ignore[arg-type]


@pytest.fixture
def changed_packages(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A transformers with another `_run_epoch` and without `_evaluate_all`, and a TRL with a new `_save_checkpoint`."""
    changed = {
        f"{TRAINER}._run_epoch": "0",
        f"{TRAINER}._evaluate_all": "0",
        "trl.trainer.sft_trainer:SFTTrainer._save_checkpoint": None,
    }
    monkeypatch.delenv(upstream.ALLOW_UNTESTED, raising=False)
    with mock.patch.dict(upstream.table()["checksums"]["agsel.runs.trainer"], changed):
        yield


def test_tested_packages_are_accepted() -> None:
    make_resumable()


@pytest.mark.usefixtures("changed_packages")
def test_changed_packages_are_refused_in_one_line() -> None:
    versions = upstream.table()["versions"]
    with pytest.raises(RunError) as refused:
        make_resumable()
    assert str(refused.value) == (
        f"transformers {versions['transformers']} differs from the tested {versions['transformers']} in "
        f"{TRAINER}._run_epoch, {TRAINER}._evaluate_all (gone); "
        f"trl {versions['trl']} differs from the tested {versions['trl']} in "
        "trl.trainer.sft_trainer:SFTTrainer._save_checkpoint: "
        f"install transformers=={versions['transformers']} trl=={versions['trl']}, or set AGSEL_ALLOW_UNTESTED=1 after "
        "running agsel's tests with yours"
    )


@pytest.mark.usefixtures("changed_packages")
def test_changed_packages_can_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(upstream.ALLOW_UNTESTED, "1")
    with pytest.warns(UserWarning, match=r"transformers .* differs from the tested .*_run_epoch"):
        make_resumable()


def test_tested_files_are_not_parsed() -> None:
    """Parsing takes a third of a second, and a run does it before its first step."""
    upstream._functions.cache_clear()
    upstream.require_tested(*upstream.table()["checksums"])
    assert upstream._functions.cache_info().misses == 0


FILE = """
class Base:
    def method(self):
        return 1

class Derived(Base):
    pass
"""
DERIVED = "changing.inner:Derived.method"
CHANGES = {
    "comment": (FILE + "# a comment", True),
    "function": (FILE.replace("return 1", "return 2"), False),
    "another function before it": (FILE.replace("pass", "method = None\n    def method(self): pass"), False),
    "gone": (FILE.replace("def method", "def other"), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_refused_if_the_function_has_changed(
    change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, accepted = CHANGES[change]
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(upstream, "version", lambda _: "2")
    write_module(tmp_path, FILE)
    tested = upstream.checksum_of(DERIVED)
    known = {
        "versions": {"changing": "1"},
        "checksums": {"agsel.example": {DERIVED: tested}},
        "files": {DERIVED: upstream.checksum_of_files(DERIVED, tested)},
    }
    with mock.patch.dict(upstream.table(), known):
        upstream.require_tested("agsel.example")
        write_module(tmp_path, text)
        if accepted:
            upstream.require_tested("agsel.example")
        else:
            with pytest.raises(
                RunError, match=r"^changing 2 differs from the tested 1 in changing\.inner:Derived\.method"
            ):
                upstream.require_tested("agsel.example")


def write_module(folder: Path, text: str) -> None:
    """As if a new process found it."""
    (folder / "changing").mkdir(exist_ok=True)
    (folder / "changing" / "inner.py").write_text(text)
    for module in ("changing", "changing.inner"):
        sys.modules.pop(module, None)
    for cached in (upstream._functions, upstream._text, upstream._text_checksum):
        cached.cache_clear()
    linecache.clearcache()
    shutil.rmtree(folder / "changing" / "__pycache__", ignore_errors=True)
    invalidate_caches()


@pytest.fixture
def example_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module as it could be of agsel."""
    file = tmp_path / "example.py"
    file.write_text(
        textwrap.dedent("""
            from deepspeed import comm as dist
            from deepspeed.runtime.engine import DeepSpeedEngine
            from deepspeed.runtime.utils import see_memory_usage as look
            from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
            from transformers import Trainer
            from transformers.trainer_callback import TrainerCallback

            RELIES_ON = {DeepSpeedEngine: ("_reduce_non_expert_gradients",)}
            STEP = "_optimizer_step"

            class Mixin:
                def setup_buckets(self):
                    self.get_param_id(None)

            class Optimizer(Mixin, DeepSpeedZeroOptimizer):
                def own(self):
                    super().backward_prologue()
                    getattr(self, "process_gradients")(getattr(self, STEP), self.own, self.attribute)

            def act(engine: DeepSpeedEngine, other):
                look(dist.barrier, engine.gradient_clipping, other.zero_grad, Trainer.get_decay_parameter_names)
        """)
    )
    spec = spec_from_file_location("agsel.example", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "agsel.example", module)
    spec.loader.exec_module(module)
    return module


def test_names_are_found_in_code(example_module: ModuleType) -> None:
    assert record_upstream.names_in(example_module) == {
        f"{STAGE_2}.setup_buckets",
        f"{STAGE_2}.get_param_id",
        f"{STAGE_2}.backward_prologue",
        f"{STAGE_2}.process_gradients",
        f"{STAGE_2}._optimizer_step",
        f"{TRAINER}.get_decay_parameter_names",
        "deepspeed.comm.comm:barrier",
        "deepspeed.runtime.engine:DeepSpeedEngine._reduce_non_expert_gradients",
        "deepspeed.runtime.engine:DeepSpeedEngine.gradient_clipping",
        "deepspeed.runtime.utils:see_memory_usage",
    }


def test_a_list_of_what_is_not_there_is_an_error(example_module: ModuleType) -> None:
    (owner,) = example_module.RELIES_ON
    example_module.RELIES_ON = {owner: ("gone",)}
    with pytest.raises(LookupError, match=r"agsel\.example\.RELIES_ON: DeepSpeedEngine has no gone"):
        record_upstream.names_in(example_module)
