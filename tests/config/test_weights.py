"""DeepSpeed's keys for where weights are, and what of them is refused."""

import re

import pytest

from ds_ring.config import RunConfig
from ds_ring.errors import ConfigError


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ([], "zero_optimization must be a JSON object, not []"),
        (False, "zero_optimization must be a JSON object, not False"),
        ({"stage": 3, "offload_param": 0}, "zero_optimization.offload_param must be a JSON object, not 0"),
        (
            {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": "maybe"}},
            "zero_optimization.offload_param.pin_memory='maybe' must be true or false",
        ),
    ],
)
def test_values_of_other_kinds(zero, said):
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        RunConfig.load({"zero_optimization": zero}, ring_degree=2).weights  # noqa: B018


@pytest.mark.parametrize("weights", ["whole", "sharded", "streamed"])
@pytest.mark.parametrize("zero", [{"stage": 2}, {"stage": 3, "lost": 1}, {"stage": 3, "offload_param": "cpu"}])
def test_weights_do_not_hide_what_a_file_says_wrongly(zero, weights):
    with pytest.raises(ConfigError, match="zero_optimization"):
        RunConfig.load({"zero_optimization": zero}, ring_degree=2, weights=weights)


def test_weights_replace_what_a_file_says_well():
    of = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    assert RunConfig.load(of, ring_degree=2, weights="sharded").weights == "sharded"
    assert RunConfig.load(of, ring_degree=2, weights="whole").weights == "whole"
