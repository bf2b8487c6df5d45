"""What `parallelize_sequence` refuses, before any rank has computed anything."""

from types import SimpleNamespace

import pytest

from peft_longlora import configure_attention
from peft_longlora.sequence import parallelize_sequence
from tests.helpers.tiny import make

MESH = SimpleNamespace(ndim=1, mesh_dim_names=("sequence",))
LINEAR = dict(linear_key_head_dim=8, linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)
MAMBA = dict(mamba_d_ssm=128, mamba_n_heads=4, mamba_d_head=32, mamba_d_state=8, mamba_chunk_size=16, hidden_size=64)
HYBRIDS = {
    "qwen3_5_text": dict(**LINEAR, head_dim=16, layer_types=["linear_attention", "full_attention"]),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "falcon_h1": dict(**MAMBA, head_dim=16),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_layers_that_carry_a_state_over_a_border_are_refused(name):
    model = make(name, **HYBRIDS[name])
    configure_attention(model, group_size=16)
    with pytest.raises(NotImplementedError, match="recurrent state or a convolution"):
        parallelize_sequence(model, MESH)


def test_a_mesh_of_two_dimensions_is_refused():
    model = make()
    configure_attention(model, group_size=16)
    with pytest.raises(ValueError, match="mesh has 2 dimensions"):
        parallelize_sequence(model, SimpleNamespace(ndim=2, mesh_dim_names=("data", "sequence")))
