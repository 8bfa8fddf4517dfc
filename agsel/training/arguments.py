"""agsel's own command-line settings: which blocks are trained when, which columns are learnt, what ends a sick run."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, cast

from agsel.policies import AdaGradSelect, FullFineTuning, Policy, RandomBlocks, TopK

METHODS = ("full", "adagradselect", "topk", "random")
RANK_TIMEOUTS = (5, 1_000_000)
"""Smallest and largest `rank_timeout` in seconds: below, a busy rank could pass for a dead one."""


@dataclass
class SelectionArguments:
    """Which blocks are updated at each optimizer step.

    Raises:
        ValueError: a setting is unknown or out of its range; the message names the flag.
    """

    _argument_group_name = "block selection"

    method: str = field(
        default="adagradselect",
        metadata={
            "help": "Selection rule: `adagradselect` (largest gradient norms while exploring, then Dirichlet draws "
            "over how often each block was chosen), `topk` (largest gradient norms at every step), `random` (uniform), "
            "`full` (every block at every step: full fine-tuning on the same engine)."
        },
    )
    select_fraction: float = field(
        default=0.3,
        metadata={
            "help": "Share of the selectable blocks updated per step, above 0 and at most 1; rounded down, at least "
            "one block. Smaller is faster and lighter, larger is closer to full fine-tuning. Not used by `full`."
        },
    )
    select_every: int = field(
        default=1, metadata={"help": "Steps for which `random` keeps its blocks. The other methods choose every step."}
    )
    epsilon_start: float = field(
        default=1.0,
        metadata={"help": "adagradselect: probability of exploring at the first step; decays exponentially from here."},
    )
    epsilon_end: float = field(
        default=0.05,
        metadata={"help": "adagradselect: probability of exploring at the end of the exploration phase; 0 afterwards."},
    )
    explore_steps: int | None = field(
        default=None,
        metadata={
            "help": "adagradselect: length of the exploration phase in optimizer steps. Default: those of the first "
            "epoch, as in the paper; 0 never explores."
        },
    )
    dirichlet_delta: float = field(
        default=1.0,
        metadata={
            "help": "adagradselect: added to every count before the Dirichlet draw. Larger values give rarely chosen "
            "blocks more chances; values near 0 lock on to the early winners."
        },
    )
    dirichlet_draw: str = field(
        default="topk",
        metadata={
            "help": "adagradselect: `topk` updates the blocks with the largest drawn probabilities, `sample` draws "
            "blocks without replacement with these probabilities."
        },
    )
    select_blocks: str | None = field(
        default=None,
        metadata={
            "help": "`layers` selects among the decoder layers and freezes embedding, final norm and head; `all` makes "
            "those selectable blocks too, and costs a backward through all layers whenever the embedding is chosen. "
            "Default: layers, but all for `--method full`."
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
    force: bool = field(
        default=False,
        metadata={"help": "Start even if the memory plan, which is printed first, says that the run does not fit."},
    )
    selection_seed: int | None = field(
        default=None, metadata={"help": "Seed of the selection's own random generator. Default: `--seed`."}
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r} (--method): use one of {', '.join(METHODS)}")
        if self.select_blocks is None:
            self.select_blocks = "all" if self.method == "full" else "layers"
        if self.select_blocks not in ("layers", "all"):
            raise ValueError(f"select_blocks must be layers or all, got {self.select_blocks!r} (--select_blocks)")
        build_policy(self, explore_steps=1, seed=0)  # refuses bad values now, not after minutes of loading

    @property
    def taking_part(self) -> Literal["layers", "all"]:
        """`select_blocks` with its default filled in, as `agsel.block_param_groups` takes it."""
        return cast(Literal["layers", "all"], self.select_blocks)


def build_policy(arguments: SelectionArguments, *, explore_steps: int, seed: int) -> Policy:
    """The policy that the settings describe.

    Args:
        arguments: the selection settings.
        explore_steps: length of the exploration phase where `arguments` leaves it open: the steps of epoch 1.
        seed: of the selection where `arguments` leaves it open: the run's seed.

    Raises:
        ValueError: a setting is out of its range.
    """
    fraction = arguments.select_fraction
    seed = seed if arguments.selection_seed is None else arguments.selection_seed
    if arguments.method == "full":
        return FullFineTuning()
    if arguments.method == "topk":
        return TopK(fraction=fraction, seed=seed)
    if arguments.method == "random":
        return RandomBlocks(fraction=fraction, every=arguments.select_every, seed=seed)
    return AdaGradSelect(
        fraction=fraction,
        explore_steps=explore_steps if arguments.explore_steps is None else arguments.explore_steps,
        epsilon_start=arguments.epsilon_start,
        epsilon_end=arguments.epsilon_end,
        dirichlet_delta=arguments.dirichlet_delta,
        draw=cast(Literal["topk", "sample"], arguments.dirichlet_draw),
        seed=seed,
    )


@dataclass
class DataArguments:
    """Which columns of the dataset are the prompt and the completion. The loss is on the completion only."""

    _argument_group_name = "columns of the dataset"

    prompt_field: str | None = field(
        default=None,
        metadata={
            "help": "Column with the prompt, for example `question`. Leave both fields and templates out for datasets "
            "in TRL's prompt-completion or messages format."
        },
    )
    completion_field: str | None = field(
        default=None, metadata={"help": "Column with the text to learn, for example `answer`."}
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "Python format string over the row's columns that makes the prompt, for example "
            "'Question: {question} Answer:'. Default: the prompt field as it is."
        },
    )
    completion_template: str | None = field(
        default=None,
        metadata={
            "help": "The same for the completion, for example ' {answer}'. The end-of-sequence token is added to it."
        },
    )


@dataclass
class SafetyArguments:
    """When a run that has gone wrong ends, and what it checks about itself.

    Raises:
        ValueError: a setting is out of its range; the message names the flag.
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
            raise ValueError(
                f"rank_timeout must be {shortest} to {longest} seconds, got {self.rank_timeout} (--rank_timeout)"
            )
        if self.max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps must be 1 or more, got {self.max_skipped_steps} (--max_skipped_steps)")
        if self.sanity_checks < 0:
            raise ValueError(
                f"sanity_checks must be a number of steps, or 0 for never, got {self.sanity_checks} (--sanity_checks)"
            )


def suggestion(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'answer'?` where a known name is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
