"""What the tests of training share: a random model of a few thousand parameters."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")
