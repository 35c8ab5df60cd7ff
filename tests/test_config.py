"""Configurations that were written down, and what does not go together."""

import dataclasses

import pytest

import tac_ray
from tac_ray.config import BuildCounterpartsConfig, CutGraphConfig, TrainHeadsConfig, from_dict


def test_a_configuration_older_than_an_option_has_its_default():
    config = tac_ray.best(images="a", n_clusters=3, out="b", seed=4)
    written = dataclasses.asdict(config)
    assert from_dict(written) == config
    del written["cut_graph"]
    del written["train_heads"]["confidence_weight"]
    assert from_dict(written) == config
    assert from_dict(written).train_heads == TrainHeadsConfig()


def test_an_image_cannot_be_joined_with_more_neighbors_than_are_found():
    with pytest.raises(ValueError, match="n_edges=60 should be <= n_neighbors=50"):
        tac_ray.best(images="a", n_clusters=3, out="b", cut_graph=CutGraphConfig(n_edges=60))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperatures_are_above_0(temperature: float):
    with pytest.raises(ValueError, match=r"distillation_temperature=.* should be > 0"):
        TrainHeadsConfig(distillation_temperature=temperature)
    with pytest.raises(ValueError, match=r"retrieval_temperature=.* should be > 0"):
        BuildCounterpartsConfig(retrieval_temperature=temperature)
