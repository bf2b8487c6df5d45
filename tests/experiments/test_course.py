"""What a cell's training changes from step to step, each beside the same thing done the plain way."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import LongLoraConfig, configure_attention
from tests.helpers.configs import tiny_llama_config

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from course import Course, cut_rows
from losses import token_losses

LENGTH, GROUP = 96, 16
IDS = torch.randint(0, 97, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(max_position_embeddings=LENGTH))


@pytest.fixture
def model():
    return get_peft_model(base(), LongLoraConfig(attention_pattern="local", group_size=GROUP)).train()


def losses(model, course: Course, step: int) -> torch.Tensor:
    course.begin(step)
    found = token_losses(model, IDS)
    course.end()
    return found


def plain(**settings) -> torch.Tensor:
    """What the same base gives without an adapter, its attention set once and for all."""
    model = base().train()
    configure_attention(model, **{"pattern": "local", "group_size": GROUP, **settings})
    return token_losses(model, IDS)


def test_steps_that_are_dense(model):
    course = Course(model, {"dense_steps": {"last": 1}}, 3)
    torch.testing.assert_close(losses(model, course, 2), plain(pattern="full", group_size=None))
    torch.testing.assert_close(losses(model, course, 0), plain())
    assert [course.share(step, lambda size: size / 100) for step in range(3)] == [0.16, 0.16, 1.0]


def test_group_sizes_take_turns(model):
    course = Course(model, {"group_sizes": [8, 32]}, 4)
    for step, size in enumerate((8, 32, 8)):
        torch.testing.assert_close(losses(model, course, step), plain(group_size=size))
        assert course.share(step, lambda size: size / 100) == size / 100
    assert course.period == 2


def test_dense_layers_take_turns(model):
    layers = model.config.num_hidden_layers
    assert layers == 2
    course = Course(model, {"rotating_layers": 1}, 4)
    for step in range(3):
        torch.testing.assert_close(losses(model, course, step), plain(dense_layers=[step % 2]))
        assert course.share(step, lambda size: 0.5) == 0.75
    assert course.period == 2


def test_what_the_tokens_weigh(model):
    each = torch.rand(LENGTH - 1)
    course = Course(model, {"unscored": 4, "dense_weight": 3.0, "dense_steps": {"last": 1}}, 2)
    counted = [each[n] for n in range(LENGTH - 1) if n < GROUP or n % GROUP >= 4]
    torch.testing.assert_close(course.weigh(0, each), torch.stack(counted).mean())
    torch.testing.assert_close(course.weigh(1, each), 3 * each.mean())
    torch.testing.assert_close(Course(model, {}, 2).weigh(0, each), each.mean())


def test_dense_forwards_of_the_adapter_are_known(model):
    course = Course(model, {"dense_weight": 2.0}, 6, dense_every=3)
    assert [course.share(step, lambda size: 0.0) for step in range(6)] == [0, 0, 1, 0, 0, 1]
    assert course.weigh(2, torch.ones(9)) == 2 and course.weigh(3, torch.ones(9)) == 1


def test_rows_in_parts_by_hand():
    rows = [{"input_ids": list(range(number, number + 4))} for number in (0, 10, 20)]
    assert cut_rows(rows, None, 3) == (rows, [0, 1, 2])
    found, before = cut_rows(rows, 2, 3)  # one forward in three is dense: the second row's
    assert [one["input_ids"] for one in found] == [[0, 1], [2, 3], [10, 11, 12, 13], [20, 21], [22, 23]]
    assert before == [0, 0.5, 1, 2, 2.5]
    assert [one["input_ids"] for one in cut_rows(rows[:1], 2, None)[0]] == [[0, 1], [2, 3]]
