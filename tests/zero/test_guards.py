"""What agsel refuses: one line on every rank that names the setting and the remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

import agsel
from agsel import shipped
from tests.cases import launch_cases
from tests.zero.guards_ranks import CASES

REFUSED = {
    "stage 0": ("zero_optimization.stage is 0", "needs 1, 2 or 3"),
    "early of one": ("gradient_accumulation_steps is 1", "raise it, or leave out choose_early"),
    "early at stage 1": ("choose_early does not work at zero_optimization.stage 1", "use stage 2 or 3"),
    "early without exploring": ("RandomBlocks never chooses by gradients", "leave out choose_early"),
    "bf16 optimizer": ("BF16_Optimizer is not supported", "use ZeRO stage 2"),
    "offload_optimizer 2": ("zero_optimization.offload_optimizer is not supported", "remove it"),
    "offload_optimizer 3": ("zero_optimization.offload_optimizer is not supported", "remove it"),
    "offload_param": ("zero_optimization.offload_param is not supported", "remove it"),
    "module granularity": ("stage3_module_granularity_threshold is not supported", "remove it"),
    "sequential gather": ("stage3_allgather_sequential is not supported", "remove it"),
    "elements and hpz": (
        "zero_optimization.zero_hpz_partition_size does not work with trained elements",
        "remove it, or use stage 2",
    ),
    "round_robin_gradients": ("zero_optimization.round_robin_gradients is not supported", "remove it"),
    "layers by keyword": ("calls its layers by keyword is not supported at zero_optimization.stage 3", "use stage 2"),
    "elastic_checkpoint": ("zero_optimization.elastic_checkpoint is not supported", "remove it"),
    "zenflow": ("zero_optimization.zenflow is not supported", "remove it"),
    "super_offload": ("offload_optimizer.super_offload is not supported", "remove offload_optimizer"),
    "moe": ("MoE layers (expert parallelism) are not supported", "use a model without"),
    "pipeline": ("PipelineEngine is not supported", "without pipeline parallelism"),
    "offload_states 2": ("engine.offload_states is not supported", "remove the call"),
    "offload_states 3": ("engine.offload_states is not supported", "remove the call"),
    "sgd": ("optimizer SGD is not supported", "pass torch.optim.AdamW"),
    "one group": ("param group 0 holds embed, final_norm, head", "agsel.block_param_groups"),
    "head left out": ("in no optimizer param group (lm_head.weight", "agsel.block_param_groups"),
    "frozen after grouping": ("param group 2 was frozen at deepspeed.initialize", "leave every block"),
    "attached twice": ("called twice", "keep the Selection"),
    "changed deepspeed": (
        "deepspeed 0.19.8 differs from the tested 0.19.8 in "
        "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer.get_flat_partition: ",
        "install deepspeed==0.19.8, or set AGSEL_ALLOW_UNTESTED=1",
    ),
}


ACCEPTED = ("changed deepspeed, allowed", "model with a selection")
SAID = {
    "reduce_scatter 1": True,
    "reduce_scatter 2": True,
    "reduce_scatter 3": False,
    "reduce_scatter false": False,
    "reduce_scatter unset": False,
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return launch_cases("tests/zero/guards_ranks.py", tmp_path_factory.mktemp("guards"))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_on_every_rank(ranks: list[dict[str, Any]], case: str) -> None:
    setting, remedy = REFUSED[case]
    for rank in ranks:
        message = rank[case]
        assert message is not None, "it was accepted"
        assert setting in message
        assert remedy in message
        assert "\n" not in message


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_on_every_rank(ranks: list[dict[str, Any]], case: str) -> None:
    assert [rank[case] for rank in ranks] == [None] * len(ranks)


@pytest.mark.parametrize("case", SAID)
def test_a_setting_without_effect_is_named_if_the_user_has_made_it(ranks: list[dict[str, Any]], case: str) -> None:
    """Once an engine; that it is DeepSpeed's default is nobody's mistake."""
    for rank in ranks:
        assert rank[case].count("\n") == 0
        assert ("zero_optimization.reduce_scatter true has no effect" in rank[case]) == SAID[case]


@pytest.mark.parametrize("name", shipped.names("ds_configs"))
def test_no_shipped_configuration_makes_it(name: str) -> None:
    file = shipped.zero_configuration(name)
    assert file is not None
    assert "reduce_scatter" not in json.loads(file.read_text())["zero_optimization"]


def test_every_case_is_judged() -> None:
    assert set(CASES) == {*REFUSED, *ACCEPTED, *SAID}


@pytest.mark.parametrize(
    ("policy", "given"),
    [(agsel.AdaGradSelect, "AdaGradSelect"), ("adagradselect", "'adagradselect'"), (None, "None")],
    ids=["class", "name", "none"],
)
def test_what_is_no_policy_is_refused(policy: Any, given: str) -> None:
    with pytest.raises(ValueError, match=rf"^policy must be a policy such as agsel\.AdaGradSelect.*, got {given}$"):
        agsel.attach(None, policy)
