"""agsel's own command-line settings: which blocks are trained when, which columns are learnt, what ends a sick run."""

from dataclasses import dataclass, field

from agsel.blocks import require_scope
from agsel.elements import METHODS as METHODS_OF_ELEMENTS
from agsel.elements import require_density, require_method
from agsel.errors import UserError
from agsel.policies import METHODS

WITH_ALL_BLOCKS = [f"`--method {name}`" for name, policy in METHODS.items() if policy.takes_part == "all"]
RANK_TIMEOUTS = (5, 1_000_000)
"""Smallest and largest `rank_timeout` in seconds: below, a busy rank could pass for a dead one."""


@dataclass
class SelectionArguments:
    """Which rule selects among which blocks, and how the engine goes about it; `methods.py` has the rules' settings.

    Raises:
        UserError: a setting is out of its range; the message names the flag.
    """

    _argument_group_name = "block selection"

    method: str = field(
        default="adagradselect",
        metadata={
            "help": f"Selection rule: {', '.join(f'`{name}` ({policy.rule})' for name, policy in METHODS.items())}; or "
            "`MODULE:CLASS`, a subclass of agsel.Policy on the Python path, whose fields are settings by their names."
        },
    )
    select_blocks: str | None = field(
        default=None,
        metadata={
            "help": "`layers` selects among the decoder layers and freezes embedding, final norm and head; `all` makes "
            "those selectable blocks too, and costs a backward through all layers whenever the embedding is chosen. "
            f"Default: layers, but all for {', '.join(WITH_ALL_BLOCKS)}."
        },
    )
    select_from: float = field(
        default=0,
        metadata={
            "help": "Number of the lowest decoder layer that takes part, or, below 1, the share of the layers below "
            "it. These stay as they are, get no adapters, and no backward goes through them. `--select_fraction` is "
            "then of the layers that take part."
        },
    )
    offload_states: bool = field(
        default=True,
        metadata={
            "help": "Keep optimizer states of unselected blocks in host memory. False keeps them on the accelerator: "
            "nothing is moved, nothing is saved."
        },
    )
    pin_memory: bool = field(
        default=True,
        metadata={
            "help": "Page-lock the host memory of the optimizer states. False where the system forbids it "
            "(`ulimit -l`): copies are then slower, and training waits for them."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the decoder layers one by one with torch.compile, at ZeRO stage 1 or 2. The first steps "
            "wait for the compiler, all others are faster. Works best with few different batch shapes "
            "(`--packing`, `--pad_to_multiple_of`)."
        },
    )
    fold_adapters: bool = field(
        default=False,
        metadata={
            "help": "Compute with LoRA adapters added to their weights for the moment, rounded to the type of the "
            "weights, as `--merge_adapter` writes them: less arithmetic in long batches. Rounding loses a part of "
            "small changes: learning lags behind at low learning rates, 1e-4 for example."
        },
    )
    choose_early: bool = field(
        default=False,
        metadata={
            "help": "Let a step that explores choose by the gradients of its first micro-batch, of several "
            "(`--gradient_accumulation_steps`): the others then cost what those of exploiting steps do. At ZeRO stage "
            "2 or 3. The choice is by fewer rows."
        },
    )
    force: bool = field(
        default=False,
        metadata={"help": "Start even if the memory plan, which is printed first, says that the run does not fit."},
    )

    def __post_init__(self) -> None:
        require_scope(self.select_blocks or "layers", self.select_from)


@dataclass
class ElementArguments:
    """Training single weights, chosen before it starts by the gradient at the initial weights.

    Raises:
        UserError: a setting is out of its range; the message names the flag.
    """

    _argument_group_name = "single weights"

    elements: str | None = field(
        default=None,
        metadata={
            "help": "Train only some elements of the weights: "
            f"{', '.join(f'`{name}` ({method.rule})' for name, method in METHODS_OF_ELEMENTS.items())}. They belong to "
            "the blocks of their layers, and `--method` says which of these are trained when; `--method full` trains "
            "all of them at every step. The choice is kept in the run folder."
        },
    )
    element_density: float = field(
        default=0.01, metadata={"help": "How many: their share of the weights of the layers that take part."}
    )
    element_samples: int = field(
        default=1000, metadata={"help": "Rows, drawn by `--seed`, whose gradient decides; all if there are fewer."}
    )

    def __post_init__(self) -> None:
        require_density(self.element_density)
        if self.element_samples < 1:
            raise UserError(f"element_samples must be 1 or more, got {self.element_samples} (--element_samples)")
        if self.elements is not None:
            require_method(self.elements)


@dataclass
class DataArguments:
    """Further datasets: to train on, and to evaluate on."""

    _argument_group_name = "datasets"

    datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Several datasets in place of `--dataset_name`, in the file of `--config`: a list of `path` and, "
            "if needed, `name`, `data_dir`, `data_files`, `split`, `columns` and `fraction`, as TRL's DatasetConfig. "
            "Each has a format of its own. Here each is written as JSON."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, folder or file to evaluate on, when `--eval_strategy` says. Default: the split "
            "`--dataset_test_split` of the training data."
        },
    )
    eval_split_fraction: float | None = field(
        default=None,
        metadata={"help": "Evaluate on this part of the training data, drawn by `--seed`, and do not train on it."},
    )


@dataclass
class SafetyArguments:
    """When a run that has gone wrong ends, and what it checks about itself.

    Raises:
        UserError: a setting is out of its range; the message names the flag.
    """

    _argument_group_name = "safety"

    rank_timeout: float = field(
        default=600,
        metadata={
            "help": "Seconds after which a rank that no longer answers (its process is stopped or frozen, its host is "
            "gone) is named and ends the job. A rank that is merely slow answers all the same. When all answer but "
            "wait for each other, `--ddp_timeout` ends the job; it must be at least as long."
        },
    )
    max_skipped_steps: int = field(
        default=50,
        metadata={
            "help": "End the run after this many optimizer steps in a row that were skipped because a gradient was "
            "infinite or not a number. fp16 skips a few at the start while it finds its loss scale; a run that goes "
            "on skipping learns nothing."
        },
    )
    sanity_checks: int = field(
        default=0,
        metadata={
            "help": "Every this many optimizer steps, verify that the frozen weights did not change, that all ranks "
            "hold equal weights, and that the optimizer states in host memory are as they were left there; a "
            "violation ends the run and names blocks and ranks. 0 never checks. The cost is printed at the end."
        },
    )

    def __post_init__(self) -> None:
        shortest, longest = RANK_TIMEOUTS
        if not shortest <= self.rank_timeout <= longest:
            raise UserError(
                f"rank_timeout must be {shortest} to {longest} seconds, got {self.rank_timeout} (--rank_timeout)"
            )
        if self.max_skipped_steps < 1:
            raise UserError(f"max_skipped_steps must be 1 or more, got {self.max_skipped_steps} (--max_skipped_steps)")
        if self.sanity_checks < 0:
            raise UserError(
                f"sanity_checks must be a number of steps, or 0 for never, got {self.sanity_checks} (--sanity_checks)"
            )


@dataclass
class OutputArguments:
    """What is written beside what TRL and transformers have settings for."""

    _argument_group_name = "output"

    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "With `--use_peft`: at the end, also write the model with the adapter added to its weights, to "
            "`merged/` in the run folder. The first rank's host must hold it once more."
        },
    )
    report: bool = field(
        default=True,
        metadata={
            "help": "At the end, draw the run into `report.html` in the run folder, a page that needs no network. "
            "`python tools/report.py RUN` makes it again, also of a run that goes on or was stopped."
        },
    )


@dataclass
class TaskArguments:
    """Tasks on which a model is judged while it trains."""

    _argument_group_name = "tasks judged at every evaluation"

    eval_tasks: str | None = field(
        default=None,
        metadata={
            "help": "`gsm8k`, `math`, or both with a comma between them, as for launch/evaluate.py: `gsm8k=test.jsonl` "
            "names a file. Whenever `--eval_strategy` evaluates, all ranks also answer their rows, and log "
            "`eval_gsm8k_nll` and `eval_gsm8k_accuracy`."
        },
    )
    eval_task_rows: int = field(
        default=200, metadata={"help": "Judge the first rows of each task, at most as many; generating takes time."}
    )
    eval_max_new_tokens: int = field(default=256, metadata={"help": "Generated at most for each of these rows."})

    def __post_init__(self) -> None:
        for name in ("eval_task_rows", "eval_max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be 1 or more, got {getattr(self, name)} (--{name})")
