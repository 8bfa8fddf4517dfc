"""Continue a run on another number of ranks, from a converted copy of its checkpoint.

ZeRO cuts optimizer states into one piece per rank, so its checkpoints fit only as many ranks as saved them. DeepSpeed's
universal form holds whole tensors, a file for each, and any number of ranks can cut those anew. Its own load forgets
some of what differs between blocks, and all that is not trained; that is put back here.
"""

from __future__ import annotations

import glob
import logging
import os
import shutil
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.checkpoint import ds_to_universal, universal_checkpoint
from deepspeed.checkpoint.constants import FROZEN_PARAM_FRAGMENTS, FROZEN_PARAM_SHAPES, PARAM
from deepspeed.runtime.utils import is_optimized_parameter

from agsel import upstream
from agsel.errors import MissingError, RunError, UserError
from agsel.zero.consensus import first_rank_does

logger = logging.getLogger("agsel")

CLIENT_STATE_KEY = "agsel"
DAY = 86400.0
"""In seconds; a conversion and its reading take minutes."""
RELIES_ON = {
    ds_to_universal: (
        "extract_zero_shards",
        "extract_zero_shards_stage3",
        "dump_param_fragment",
        "merge_tp_slices",
        "merge_zero3_slices",
        "_merge_zero_shards",
        "_inject_missing_state",
        "_do_parallel_work",
        "_save_optimizer_state",
        "_save_optimizer_state_stage3",
    ),
    universal_checkpoint: ("load_hp_checkpoint_state",),
}
"""Functions of DeepSpeed whose inner working this module depends on, besides those that the code names."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk, as the first rank sees it.

    Attributes:
        folder: that was given to `save_checkpoint`.
        tag: name of the checkpoint's own folder in it.
        ranks: that saved it.
        convert: whether this run can load only a converted copy.
        state: agsel's part of the client state, read ahead if `convert`.
    """

    folder: Path
    tag: str
    ranks: int
    convert: bool
    state: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        """The checkpoint's own folder."""
        return self.folder / self.tag


def find(engine: Any, load_dir: str, tag: Any, load_optimizer_states: bool, load_module_only: bool) -> Saved:
    """Look at the checkpoint that is to be loaded, on the first rank for all.

    Raises:
        MissingError: there is none.
        UserError: files of it are missing, or it cannot be loaded by another number of ranks.
    """
    look = partial(_look_at, engine, load_dir, tag, load_optimizer_states, load_module_only)
    return first_rank_does(look, engine.optimizer.dp_process_group)


def optimizer_state(engine: Any) -> dict[str, Any]:
    """What DeepSpeed's universal load does not keep apart, as plain Python values: part of the client state."""
    selection, client = engine.selection, engine.optimizer.optimizer
    return {
        "adam_steps": {
            selection.blocks[partition.block]: int(client.state[partition.master]["step"])
            for partition in selection.residency.partitions
        },
        "param_groups": [
            {key: value.item() if torch.is_tensor(value) else value for key, value in group.items() if key != "params"}
            for group in client.param_groups
        ],
    }


def load(engine: Any, saved: Saved, stock_load: Callable[..., tuple[Any, Any]], **options: Any) -> tuple[Any, Any]:
    """Load a converted copy of a checkpoint: all that `stock_load` restores from it, the loss scale of fp16 included.

    Args:
        engine: a SelectiveEngine, with all blocks trainable.
        saved: what `find` returned.
        stock_load: `DeepSpeedEngine.load_checkpoint` of this engine.
        options: its arguments after the tag.

    Raises:
        RunError: on every rank, if the conversion failed.
    """
    with _converted(engine, saved) as copy:
        _load_untrained(engine, copy / saved.tag, options["load_module_strict"], options["custom_load_fn"])
        with _reading_universal(engine):
            path, client_state = stock_load(str(copy), saved.tag, **options)
    if not options["load_module_only"]:
        _restore_optimizer(engine, client_state[CLIENT_STATE_KEY])
    return str(saved.path / Path(path).name), client_state


def _look_at(engine: Any, load_dir: str, tag: Any, load_optimizer_states: bool, load_module_only: bool) -> Saved:
    folder = Path(os.path.abspath(load_dir))
    tag = _latest(folder) if tag is None else str(tag)
    ranks, stage = engine.seq_dp_world_size, int(engine.zero_optimization_stage())
    model_file = _first_model_file(engine, folder, tag)
    if not model_file.is_file():
        raise MissingError(f"{folder / tag} holds no checkpoint of ZeRO stage {stage}: no {model_file.name}")
    files = len(list(model_file.parent.glob("*_optim_states.pt")))
    as_it_is = Saved(folder, tag, ranks, convert=False)
    if stage < 3 and (load_module_only or not load_optimizer_states):  # whole weights are in the model file
        return as_it_is
    must_convert = stage == 3 and load_module_only  # stock would load nothing
    if files == ranks and not must_convert:
        return as_it_is
    saved = _read(model_file)
    if saved["dp_world_size"] == ranks and not must_convert:  # files of an older save lie under the same tag
        return as_it_is
    if files != (ranks := saved["dp_world_size"]):
        raise UserError(f"{folder / tag} is incomplete: {ranks} ranks saved it, it has {files} *_optim_states.pt")
    if not load_module_only:
        _require_convertible(engine, folder / tag, saved, load_optimizer_states)
    return Saved(folder, tag, ranks, convert=True, state=saved.get(CLIENT_STATE_KEY))


def _require_convertible(engine: Any, path: Path, saved: dict[str, Any], load_optimizer_states: bool) -> None:
    ranks, state = saved["dp_world_size"], saved.get(CLIENT_STATE_KEY, {})
    if not load_optimizer_states:
        raise UserError(
            f"load_optimizer_states=False is not supported at ZeRO stage 3 for {path}, which {ranks} ranks saved: load "
            f"it on {ranks} ranks, or use load_module_only=True"
        )
    if "adam_steps" not in state:
        raise UserError(
            f"{path} was saved by {ranks} ranks without agsel, which keeps the Adam steps of the blocks: load it on "
            f"{ranks} ranks, or only its weights (load_module_only=True)"
        )
    groups = len(engine.optimizer.optimizer.param_groups)
    if state["blocks"] == list(engine.selection.blocks) and len(state["param_groups"]) != groups:
        raise UserError(
            f"{path} has {len(state['param_groups'])} optimizer param groups, this run {groups}: build the optimizer "
            "as the saved run did"
        )


def _latest(folder: Path) -> str:
    try:
        return (folder / "latest").read_text().strip()
    except OSError:
        raise MissingError(
            f"{folder} holds no checkpoint: it has no file named latest; name the folder that was given to "
            "save_checkpoint, or a tag"
        ) from None


@contextmanager
def _converted(engine: Any, saved: Saved) -> Iterator[Path]:
    """A folder beside the checkpoint's, with a universal copy under the same tag; removed in the end.

    The disk needs room for twice the optimizer states meanwhile.
    """
    group = engine.optimizer.dp_process_group
    ranks, is_first = dist.get_world_size(group), dist.get_rank(group) == 0
    copy = first_rank_does(partial(_convert, saved), group)
    try:
        if is_first:
            logger.info("converted %s saved by %d ranks for %d", saved.path, saved.ranks, ranks)
        yield copy
        dist.barrier(group)  # before it, others may still be reading
    finally:
        if is_first:
            shutil.rmtree(copy, ignore_errors=True)


def _convert(saved: Saved) -> Path:
    """The copy, which is of this run alone."""
    upstream.require_tested(__name__)
    try:
        copy = _own_folder(saved)
        try:
            _write_copy(saved.path, copy / saved.tag)
        except Exception:
            shutil.rmtree(copy, ignore_errors=True)
            raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RunError(
            f"{saved.path} could not be converted for another number of ranks ({reason}): load it on {saved.ranks} "
            "ranks, or load another checkpoint"
        ) from error
    return copy


def _own_folder(saved: Saved) -> Path:
    """A new one beside the checkpoint's. What killed runs have left goes, if it is so old that no run reads it."""
    name, beside = f".universal-{saved.folder.name}-{saved.tag}-", saved.folder.parent
    for copy in beside.glob(f"{glob.escape(name)}*"):
        if time.time() - copy.stat().st_mtime > DAY:
            shutil.rmtree(copy, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=name, dir=beside))


def _write_copy(source: Path, copy: Path) -> None:
    """In this process only: one forked from it could not use CUDA."""
    options = Namespace(
        input_folder=str(source),
        output_folder=str(copy),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,  # at stages 1 and 2 Hugging Face models have none
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        ds_to_universal.main(options)
    _add_frozen_weights(source, copy / "zero")


def _add_frozen_weights(source: Path, copy: Path) -> None:
    """What the converter leaves out at stage 3; each rank that saved has its piece of them in its model file."""
    files = sorted(source.glob("zero_pp_rank_*_model_states.pt"), key=ds_to_universal._zero3_rank_from_file)
    by_rank = [_read(file) for file in files]
    for name, shape in (by_rank[0][FROZEN_PARAM_SHAPES] or {} if by_rank else {}).items():
        whole = torch.cat([saved[FROZEN_PARAM_FRAGMENTS][name] for saved in by_rank])[: shape.numel()]
        (copy / name).mkdir(parents=True, exist_ok=True)
        torch.save({PARAM: whole.view(shape)}, copy / name / "fp32.pt")


def _load_untrained(engine: Any, copy: Path, strict: bool, custom_load_fn: Any) -> None:
    """Frozen weights and buffers, which DeepSpeed's universal load leaves out."""
    checkpoint = _read(_first_model_file(engine, copy.parent, copy.name))
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()
        checkpoint[FROZEN_PARAM_FRAGMENTS] = _frozen_partitions(engine, copy / "zero")
    engine.load_module_state_dict(checkpoint, strict=strict, custom_load_fn=custom_load_fn)


def _frozen_partitions(engine: Any, folder: Path) -> dict[str, torch.Tensor] | None:
    """This rank's pieces by name, None if the checkpoint was saved without frozen weights."""
    names = {name: p for name, p in engine.module.named_parameters() if not is_optimized_parameter(p)}
    if not all((folder / name).is_dir() for name in names):
        return None
    load = engine.optimizer.load_hp_checkpoint_state
    return {name: load(folder / name, "fp32", param=parameter) for name, parameter in names.items()}


@contextmanager
def _reading_universal(engine: Any) -> Iterator[None]:
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def _restore_optimizer(engine: Any, state: dict[str, Any]) -> None:
    """At stage 3 the universal load gives every block the first one's Adam step, as one tensor, and settings."""
    selection, client = engine.selection, engine.optimizer.optimizer
    for partition in selection.residency.partitions:
        client.state[partition.master]["step"] = state["adam_steps"][selection.blocks[partition.block]]
    for group, saved in zip(client.param_groups, state["param_groups"], strict=True):
        group.update(saved)


def _first_model_file(engine: Any, folder: Path, tag: str) -> Path:
    """The model file that the first rank saved."""
    return Path(engine._get_ckpt_name(str(folder), tag, pp_placeholder="0"))


def _read(file: Path) -> dict[str, Any]:
    """A file of a checkpoint, its tensors read from the disk as they are used."""
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)
