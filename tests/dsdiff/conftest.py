"""The small model of the tests, as its options are resolved."""

import pytest

from dsdiff import ModelOptions, find_model


@pytest.fixture(scope="module")
def spec(small_model):
    config, ckpt = small_model
    return find_model(ModelOptions(config=config, ckpt=ckpt))
