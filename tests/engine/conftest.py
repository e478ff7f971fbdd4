"""The tiny models as they are, each made once; who changes a model makes one of his own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.engine.models import TinyModel, make_model


@pytest.fixture(scope="session")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyModel]:
    """``model_of(name, dtype)``: a model of ``tests.engine.models.CONFIGS``, in float32 unless told otherwise."""
    made: dict[tuple[str, torch.dtype], TinyModel] = {}

    def model_of(name: str, dtype: torch.dtype = torch.float32) -> TinyModel:
        if (name, dtype) not in made:
            made[name, dtype] = make_model(tmp_path_factory.mktemp(name), name, dtype)
        return made[name, dtype]

    return model_of
