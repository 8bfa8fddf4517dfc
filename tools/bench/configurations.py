"""What one row of the benchmark measures."""

from __future__ import annotations

from dataclasses import dataclass

from agsel.errors import UserError

LIGER = {"none": "", "loss": "Liger's loss", "all": "Liger", "trl": "Liger, TRL's loss"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """What one row measures. A micro-batch is `micro_batch` rows of `sequence` tokens per GPU."""

    model: str
    stage: int
    method: str
    ranks: int = 2
    fraction: float = 0.3
    density: float = 0.01
    select_from: float = 0
    micro_batch: int = 8
    sequence: int = 512
    liger: str = "none"
    checkpointing: bool = False
    compile: bool = False
    offload_states: bool = True
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.stage not in (1, 2, 3):
            raise UserError(f"stage must be 1, 2 or 3, got {self.stage} (--stages)")
        for name in ("ranks", "accumulation"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be at least 1, got {value} (--{name})")
        for name, flag in (("fraction", "fractions"), ("density", "densities")):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value <= 1:
                raise UserError(f"{name} must be above 0 and at most 1, got {value} (--{flag})")
        if self.liger not in LIGER:
            raise UserError(f"unknown value {self.liger!r} (--liger): use {', '.join(LIGER)}")
        if self.liger in ("all", "trl") and self.compile:
            raise UserError("Liger's kernels inside the layers cannot be compiled: use --liger loss, or --compile off")

    @property
    def label(self) -> str:
        """Name of the row in its group."""
        fraction = "" if self.fraction == Configuration.fraction else f" {self.fraction:.0%}"
        density = "" if self.density == Configuration.density else f", density {100 * self.density:g}%"
        above = f", from {self.select_from:g}" if self.select_from else ""
        return f"{self.method}{fraction}{density}{above}{'' if self.offload_states else ', no offload'}"

    @property
    def setting(self) -> str:
        """All but the method: what rows must share to be compared."""
        switches = [LIGER[self.liger]] if LIGER[self.liger] else []
        switches += [name for name in ("checkpointing", "compile") if getattr(self, name)]
        accumulation = [f"accumulation {self.accumulation}"] if self.accumulation > 1 else []
        shape = f"{self.micro_batch} x {self.sequence}"
        ranks = f"{self.ranks} rank{'s' * (self.ranks > 1)}"
        return ", ".join([self.model, f"ZeRO-{self.stage}", shape, *accumulation, *switches, ranks])

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one GPU sees in an optimizer step."""
        return self.micro_batch * self.sequence * self.accumulation
