"""One made-up run and its report for the whole folder."""

import pytest
from report.synthetic_run import make_run

from nasbench.report.facts import collect
from nasbench.report.html import Page


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(run, folder of profile databases)."""
    return make_run(tmp_path_factory.mktemp("made"), strategies=("beam", "optuna"), evaluations=80)


@pytest.fixture(scope="session")
def facts(made):
    return collect(*made)


@pytest.fixture(scope="session")
def whole(facts):
    """Everything of the report, before it is written."""
    return Page.of(facts)


@pytest.fixture(scope="session")
def page(made, whole):
    """The written page."""
    return whole.write(made[0].report)
