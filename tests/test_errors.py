"""Errors with fields: a caller names its own argument without reading the message."""

from __future__ import annotations

import pickle

import pytest

from mgebm_fast.cli.options import named_options
from mgebm_fast.errors import CheckpointError, ConfigError, DataError, Refused


def test_the_text_is_made_of_the_fields():
    assert str(Refused("steps", "be an int >= 0", -1, "chain")) == "chain: steps must be an int >= 0, got -1"
    assert str(ConfigError("sizes must grow")) == "sizes must grow"
    assert str(DataError("x is empty")) == "load: x is empty"
    assert str(CheckpointError("damaged", "a/b")) == "a/b: damaged"


@pytest.mark.parametrize("error", [Refused("n", "be 1", 2, "f"), DataError("is empty", "mask"), ConfigError("wrong")])
def test_an_error_keeps_its_fields_when_it_is_copied(error):
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))
    moved = error.at("there")
    assert str(moved) == f"there: {error.words}" and moved.words == error.words and error.where != "there"


def test_an_option_takes_the_place_of_the_argument():
    with pytest.raises(Refused, match=r"^--labels: must be at least 2, got 1$"), named_options("labels"):
        raise Refused("labels", "be at least 2", 1, "few_labels")
    with pytest.raises(Refused, match=r"^few_labels: draws must be at least 1, got 0$"), named_options("labels"):
        raise Refused("draws", "be at least 1", 0, "few_labels")
    with pytest.raises(DataError, match=r"^--data: x must be a folder$"), named_options():
        raise DataError("x must be a folder")
    with pytest.raises(DataError, match=r"^mask: x must be a folder$"), named_options():
        raise DataError("x must be a folder", "mask")
