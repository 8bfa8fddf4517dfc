"""The trainer of a run: TRL's, with agsel's own tokens of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig
from trl.trainer import utils as trl_utils

from agsel import upstream
from agsel.data.tokens import ENDED, Learning, TokenReport, has_conversations, tokenise
from agsel.errors import UserError, said_of
from agsel.runs.turns import in_turns
from agsel.training.data import EVALUATION
from agsel.training.judging import TaskJudge
from agsel.training.lean_steps import LeanSteps

RELIES_ON = {trl_utils: ("add_fused_lm_head",)}
"""The head whose loss probes ask for, too, because the options of the step's forward do."""
TOKENS_OF_UNIT = 4096
"""Sums of losses are divided by it: gradients of whole batches must fit into 16 bits."""
SPLITTING = ("bfd_split", "wrapped")
"""Packing strategies that go on with the rest of a long row in the next sequence."""


def choose_learning(training: SFTConfig, rows: Dataset) -> Learning:
    """What `--completion_only_loss` and `--assistant_only_loss` say is learnt of the rows; TRL is not told.

    Raises:
        UserError: the words of the assistant are to be learnt, and there are no conversations.
    """
    if training.assistant_only_loss and not has_conversations(rows):
        raise UserError("--assistant_only_loss needs conversations, and the dataset has prompts and completions")
    learning = Learning(
        completions_only=training.completion_only_loss is not False,
        assistant_only=training.assistant_only_loss is not False,
    )
    training.assistant_only_loss = False
    return learning


class RowTrainer(LeanSteps):
    """`LeanSteps` that is given rows of `agsel.data.formats`, and makes tokens of them.

    Args:
        arguments, options: of `SFTTrainer`.
        learning: what is learnt of a row.

    Raises:
        RunError: this TRL differs from the tested one where it prepares rows.

    Attributes:
        learning: the same.
        judge: of tasks at every evaluation, if there are any.
        token_reports: of the datasets that were tokenised, by `train` and `eval`.
    """

    def __init__(self, *arguments: Any, learning: Learning, **options: Any) -> None:
        upstream.require_tested(__name__, LeanSteps.__module__)
        self.learning = learning
        self.token_reports: dict[str, str] = {}
        self.judge: TaskJudge | None = None
        super().__init__(*arguments, **options)

    def summed_loss(self, rows: Sequence[dict[str, Any]]) -> Tensor:
        """The loss of rows as tokens, summed over these, in a unit of its own and without a trace in what is logged.

        Rows count by what is learnt of them, whatever others are in their batch.
        """
        metrics, tokens, unread = deepcopy(self._metrics), self._total_train_tokens, len(self._unread)
        batch = {n: v.to(self.args.device) if torch.is_tensor(v) else v for n, v in self.data_collator(rows).items()}
        unit = torch.tensor(TOKENS_OF_UNIT, device=self.args.device)
        learnt = (batch["labels"][:, 1:] != -100).sum() * self._scale_of_loss()
        self.current_gradient_accumulation_steps = unit / learnt  # TRL divides experts' balance by it
        loss = self.compute_loss(self.model, batch, num_items_in_batch=unit)
        self._metrics, self._total_train_tokens = metrics, tokens
        self.forget_measures(unread)
        return loss

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing with a checkpoint: the card belongs to the trained model, and TRL's knows little of the run."""

    def _scale_of_loss(self) -> int:
        """By which TRL multiplies a loss that is divided by a number of tokens."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """The metrics of the Trainer, and those of the tasks."""
        metrics = super().evaluate(*arguments, **options)
        if self.judge is not None:
            found = self.judge.metrics(self)
            self.log(dict(found))
            metrics |= found
        return metrics

    def _prepare_dataset(
        self,
        dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Dataset:
        if "input_ids" not in dataset.column_names:
            with in_turns(), _named(dataset_name):
                dataset = tokenise(dataset, processing_class, self.learning, args.dataset_num_proc)
            longest = None if packing and args.packing_strategy in SPLITTING else args.max_length
            report = TokenReport.of(dataset, longest)
            self.token_reports[dataset_name] = report.describe(loses_end=args.truncation_mode == "keep_start")
            dataset = dataset.remove_columns(ENDED)
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)


def _named(dataset_name: str) -> AbstractContextManager[None]:
    return said_of(EVALUATION) if dataset_name == "eval" else nullcontext()
