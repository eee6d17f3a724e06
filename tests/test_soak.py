"""The parts of the soak tests."""

from __future__ import annotations

import pytest

from tests import soak

RESUME = "tests/suites/test_resume.py::test_resume[wau-sgd-epoch_end]"


def test_a_soak_test_has_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collection asks for the part of every one, so that a test in none or in two stops every run."""
    assert soak.part(RESUME) == "soak_resume"
    with pytest.raises(ValueError, match=r"test_new must belong to one part of tests/soak.py, not to \[\]"):
        soak.part("tests/wavelet/test_wavelet.py::test_new")
    monkeypatch.setitem(soak.PARTS, "soak_copy", soak.PARTS["soak_resume"])
    with pytest.raises(ValueError, match=r"not to \['soak_resume', 'soak_copy'\]"):
        soak.part(RESUME)


def test_collection_asks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook of ``conftest.py`` refuses this very test, were it marked."""
    from tests.conftest import pytest_collection_modifyitems

    request.node.add_marker("soak")
    with pytest.raises(ValueError, match="test_collection_asks must belong to one part"):
        pytest_collection_modifyitems([request.node])
    monkeypatch.setitem(soak.PARTS, "soak_copy", ("tests/test_soak.py",))
    request.node.config.addinivalue_line("markers", "soak_copy: of this test")
    pytest_collection_modifyitems([request.node])
    assert request.node.get_closest_marker("soak_copy")
