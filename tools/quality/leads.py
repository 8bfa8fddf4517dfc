"""Rules that the study tries as ways past LoRA and that are no methods of agsel: `--method tools.quality.leads:CLASS`.

Each is AdaGradSelect with one thing changed. The plans `*-leads.yaml` beside this file run them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from agsel.errors import UserError
from agsel.policies import AdaGradSelect
from agsel.policies.policy import BlockInfo, Update, blocks_of_fraction, largest, setting


@dataclass(kw_only=True)
class ForgettingCounts(AdaGradSelect):
    """Draws from Dirichlet(c + δ), where c forgets: c ← decay · c + (1 for the blocks of a step)."""

    count_decay: float = setting(0.9, help="What is left of every count after a step.")

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Begin with nothing counted."""
        super().start(blocks)
        self._recent = np.zeros(len(blocks))

    @property
    def concentration(self) -> np.ndarray:
        """Of recent counts alone."""
        return self._recent + self.dirichlet_delta

    def commit(self, norms: Mapping[int, float]) -> Update:
        """Count, after forgetting."""
        update = super().commit(norms)
        self._recent *= self.count_decay
        self._recent[list(update.blocks)] += 1
        return update

    def state_dict(self) -> dict[str, Any]:
        """The recent counts, too."""
        return {**super().state_dict(), "recent": self._recent.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The recent counts, too."""
        super().load_state_dict({name: value for name, value in state.items() if name != "recent"})
        self._recent = np.asarray(state["recent"])


@dataclass(kw_only=True)
class ChangingFraction(AdaGradSelect):
    """The share of the blocks changes from `select_fraction` to another one, evenly over the run; draws are `topk`."""

    fraction_end: float = setting(help="Share of the selectable blocks in the last step.")

    def complete(self, epoch_steps: int, run_steps: int) -> None:
        """Also note how long the run is."""
        super().complete(epoch_steps, run_steps)
        self._run_steps = run_steps

    @property
    def blocks_per_step(self) -> int:
        """The most that a step updates."""
        return max(super().blocks_per_step, blocks_of_fraction(self.fraction_end, self.number_of_blocks))

    def largest(self, values: Mapping[int, float]) -> frozenset[int]:
        """As many as the current step updates."""
        share = self.fraction + (self.fraction_end - self.fraction) * self.step / max(1, self._run_steps - 1)
        return largest(values, blocks_of_fraction(share, self.number_of_blocks))


@dataclass(kw_only=True)
class RelativeNorms(AdaGradSelect):
    """Explores by ||gradient|| / ||weights||, with the norms that the layers' weights had before training.

    Dividing by the root of a layer's size would change nothing: all layers of the models that are compared are alike.
    """

    norms_of: str = setting(help="Folder of the model before training, for the norms of its layers' weights.")

    def start(self, blocks: Sequence[BlockInfo]) -> None:
        """Read the norms.

        Raises:
            UserError: a block is no decoder layer of that model.
        """
        super().start(blocks)
        squares: dict[str, float] = {}
        with safe_open(Path(self.norms_of, "model.safetensors"), "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                _, _, within = name.partition("layers.")
                layer = f"layers.{within.partition('.')[0]}"
                squares[layer] = squares.get(layer, 0.0) + float(weights.get_tensor(name).double().square().sum())
        unknown = next((block.name for block in blocks if block.name not in squares), None)
        if unknown is not None:
            raise UserError(f"{self.norms_of} (--norms_of) has no {unknown}: name the model, and select among layers")
        self._norms = [squares[block.name] ** 0.5 for block in blocks]

    def choose(self, norms: Mapping[int, float]) -> Update:
        """By relative norms, where norms decide."""
        return super().choose({block: norm / self._norms[block] for block, norm in norms.items()})
