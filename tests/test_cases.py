"""The harness of the rank scripts: a case that fails or cannot run is seen by its own tests and by no others."""

from __future__ import annotations

from unittest import mock

import pytest
from deepspeed.accelerator import get_accelerator

from tests.cases import CannotRun, Failed, Results, launch_cases, require_dtype


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return launch_cases("tests/case_faults_ranks.py", tmp_path_factory.mktemp("cases"), ranks=2)


@pytest.mark.parametrize("name", ["before", "after"])
def test_the_other_cases_of_a_launch_keep_their_results(ranks: list[Results], name: str) -> None:
    assert [rank[name] for rank in ranks] == [0, 1]


def test_a_case_that_fails_on_one_rank_fails_its_tests_with_that_ranks_traceback(ranks: list[Results]) -> None:
    for rank in ranks:
        with pytest.raises(pytest.fail.Exception, match=r"case fails failed on the ranks(.|\n)*what went wrong"):
            rank["fails"]


def test_a_rank_that_dies_fails_the_tests_of_its_case(ranks: list[Results]) -> None:
    for rank in ranks:
        with pytest.raises(pytest.fail.Exception, match="case dies failed on the ranks"):
            rank["dies"]


def test_a_case_that_cannot_run_is_skipped_by_name_with_the_reason(ranks: list[Results]) -> None:
    for rank in ranks:
        with pytest.raises(pytest.skip.Exception, match="cannot run: this machine lacks something"):
            rank["cannot run"]


@pytest.mark.parametrize("supported", [True, False])
def test_half_precision_cannot_run_where_the_accelerator_says_so(supported: bool) -> None:
    with mock.patch.object(type(get_accelerator()), "is_fp16_supported", return_value=supported):
        require_dtype("bf16")
        if supported:
            require_dtype("fp16")
        else:
            with pytest.raises(CannotRun, match=r"has no fp16 here \(get_accelerator\(\)\.is_fp16_supported\(\)\)"):
                require_dtype("fp16")


def test_joined_results_are_judged_too() -> None:
    joined = Results(right=1) | Results(wrong=Failed("the story"))
    assert joined["right"] == 1
    with pytest.raises(pytest.fail.Exception, match=r"case wrong failed .*\n.*the story"):
        joined["wrong"]
