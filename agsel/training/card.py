"""The model card of a trained model, and the guide to a run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from agsel.data.sources import BUILDERS
from agsel.monitor import METRICS, SELECTION, STARTS, SelectionHistory, block_ranges, count_levels, duration, pictures
from agsel.replacing import replace_file
from agsel.training.data import training_sources
from agsel.training.environment import FILE as ENVIRONMENT

CARD = "README.md"
GUIDE = "# A run of agsel\n"
"""How that of a run folder begins."""
PICTURE = "selection.png"
SHOWN_SETTINGS = ("model_name_or_path", "dataset_name", "use_peft", "elements")
"""Settings that the card tells elsewhere, in words."""
FILES = {
    "README.md": "this page",
    "report.html": "the run in pictures and tables, for any browser",
    "model": "the trained model, or adapter, with its card",
    "merged": "the model with the adapter added to its weights",
    "elements.safetensors": "the single weights that were trained: their positions and values",
    "mask.safetensors": "which single weights are trained, and by what they were chosen",
    "mask.before.safetensors": "the choice that was there before, by other settings or rows",
    "config.yaml": "every setting of the run, for `--config`",
    ENVIRONMENT: "versions, devices, commit and command",
    METRICS: "a line of numbers for every logged step and every evaluation",
    SELECTION: "for every step how its blocks were chosen, which, and the gradient norms that were measured",
    STARTS: "when the run was started, after which step, and how far the process before had come",
    "selection.json": "how often each block was trained",
    "result.json": "what the run cost and reached; written last but for the report",
    "tensorboard": "the curves, for `tensorboard --logdir`",
    "logs": "what each rank has printed",
    "checkpoint-*": "to go on from, each with a manifest of its files",
    "abandoned-*": "checkpoints of steps that were done once more",
}
"""Of a run folder, in the order in which people look at them."""


@dataclass(frozen=True)
class Run:
    """What there is to say of a run that has ended.

    Attributes:
        settings: all.
        compared: those by which people compare runs.
        result: as in `result.json`.
        history: of the selection, as far as it is recorded.
        counts: how often each block was trained.
        environment: as in `environment.json`.
    """

    settings: Mapping[str, Any]
    compared: Mapping[str, Any]
    result: Mapping[str, Any]
    history: SelectionHistory
    counts: Mapping[str, int]
    environment: Mapping[str, Any]


def write_card(folder: Path, run: Run) -> None:
    """Write README.md and its picture beside a model."""
    if run.history.steps:
        (folder / PICTURE).write_bytes(pictures.png(pictures.selection_map(run.history)))
    text = "\n\n".join(_sections(folder, run))
    ModelCard(f"---\n{card_data(run.settings).to_yaml()}\n---\n\n{text}\n").save(folder / CARD)


def card_data(settings: Mapping[str, Any]) -> ModelCardData:
    """What the hub reads of the card; nothing that is unknown."""
    base = settings["model_name_or_path"]
    datasets = [name for name in _datasets(settings) if _is_on_hub(name) and name not in BUILDERS]
    return ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=datasets or None,
        library_name="peft" if settings.get("use_peft") else "transformers",
        license=_licence(base),
        pipeline_tag="text-generation",
        tags=["agsel", settings["method"].split(":")[-1], "sft"],
    )


def write_guide(folder: Path, has_report: bool) -> None:
    """Write README.md of a run folder: a line for each of its files, also for those that are written after it.

    One of the user's stays.
    """
    path = folder / CARD
    if path.exists() and not (path.is_file() and path.read_text(encoding="utf-8", errors="replace").startswith(GUIDE)):
        return
    coming = (CARD, "result.json", *(["report.html"] if has_report else []))
    lines = [f"- `{name}`: {what}" for name, what in FILES.items() if name in coming or any(folder.glob(name))]
    replace_file(path, GUIDE + "\n" + "\n".join(lines) + "\n")


def _sections(folder: Path, run: Run) -> Iterator[str]:
    settings = run.settings
    base = settings["model_name_or_path"]
    data = ", ".join(_called(name, "datasets/") for name in _datasets(settings))
    kind = "Adapter for" if settings.get("use_peft") else "Fine-tuned from"
    yield f"# {folder.resolve().parent.name}"
    yield (
        f"{kind} {_called(base)} on {data} with agsel, method {settings['method']}: the method says which blocks of "
        "the model are trained at each step."
    )
    yield "## Use\n\n```python\n" + _use(settings) + "\n```"
    rows = [(name, value) for name, value in run.compared.items() if name not in SHOWN_SETTINGS and value is not None]
    yield "## Training\n\n" + _table(rows)
    if any(run.counts.values()):
        image = f"\n\n![Blocks trained at each step, by depth: {block_ranges(run.counts)}]({PICTURE})"
        yield f"## Blocks trained\n\n{count_levels(run.counts)}{image if run.history.steps else ''}"
    yield "## Results\n\n" + _table(_results(run.result))
    packages = [*run.environment["packages"].items(), ("Python", run.environment["python"])]
    yield "## Versions\n\n" + ", ".join(f"{name} {found}" for name, found in packages)


def _results(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    texts = {
        "loss": ("training loss at the end", "{:.4f}".format),
        "eval_loss": ("evaluation loss", "{:.4f}".format),
        "steps": ("optimizer steps", "{:,}".format),
        "exported_step": ("the model is that of step", "{:,}".format),
        "train_seconds": ("time", duration),
        "parameters": ("parameters", "{:,}".format),
        "trainable_parameters": ("of these in blocks that take part", "{:,}".format),
        "peak_bytes": ("peak GPU memory", lambda number: f"{number / 1e9:.1f} GB"),
    }
    if result.get("exported_step") == result["steps"]:
        del texts["exported_step"]
    return [(text, show(result[name])) for name, (text, show) in texts.items() if result.get(name) is not None]


def _use(settings: Mapping[str, Any]) -> str:
    if settings.get("use_peft"):
        kind, imports = (
            "AutoPeftModelForCausalLM",
            "from peft import AutoPeftModelForCausalLM\nfrom transformers import ",
        )
    else:
        kind, imports = "AutoModelForCausalLM", "from transformers import AutoModelForCausalLM, "
    return (
        f'{imports}AutoTokenizer\n\nfolder = "..."  # where this file is\nmodel = {kind}.from_pretrained(folder)\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)"
    )


def _table(rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {name} | {_in_cell(value)} |" for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *lines])


def _in_cell(value: Any) -> str:
    """A bar or a new line would end the cell of a table."""
    return " ".join(str(value).replace("|", r"\|").split())


def _datasets(settings: Mapping[str, Any]) -> list[str]:
    """Each once; of several parts of one dataset, too."""
    return list(dict.fromkeys(source.name for source in training_sources(settings)))


def _called(name: str, kind: str = "") -> str:
    """A link to the hub, or the last part of a path: the rest is nobody's business."""
    if name in BUILDERS:
        return f"{name} files"
    return f"[{name}](https://huggingface.co/{kind}{name})" if _is_on_hub(name) else f"`{Path(name).name}`"


def _is_on_hub(name: str) -> bool:
    """As far as a name tells: there is no such file here, and it could be a repository."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _licence(base: str) -> str | None:
    """Of the base model, from the card beside it or in the cache of the hub."""
    beside = Path(base, CARD)
    card = beside if beside.is_file() else try_to_load_from_cache(base, CARD) if _is_on_hub(base) else None
    if not isinstance(card, str | Path):
        return None
    try:
        licence = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, YAMLError):  # it is somebody else's
        return None
    return licence if isinstance(licence, str) else None
