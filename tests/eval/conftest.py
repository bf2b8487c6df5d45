"""Runs draw their plots only for a test that takes `plots`."""

import pytest


@pytest.fixture
def plots():
    """The test looks at what is drawn."""


@pytest.fixture(autouse=True)
def draw_if_asked(request):
    if "plots" not in request.fixturenames:
        request.getfixturevalue("no_plots")
