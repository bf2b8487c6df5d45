"""Courses that cannot be kept to are refused when the study is read, or by the model, before a step is trained."""

import sys
from pathlib import Path

import pytest
import yaml
from peft import get_peft_model
from transformers import LlamaForCausalLM

from peft_longlora import LongLoraConfig
from tests.helpers.configs import tiny_llama_config

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from cells import read_study
from course import Course

REFUSED = [
    ({"dense_steps": {"lst": 3}}, "dense_steps"),
    ({"dense_steps": {}}, "dense_steps"),
    ({"dense_steps": 25}, "dense_steps"),
    ({"dense_steps": {"every": 0}}, "dense_steps"),
    ({"dense_steps": {"every": 3, "after": -5}}, "dense_steps"),
    ({"dense_steps": {"last": 3, "after": 5}}, "every is missing"),
    ({"rotating_layers": 0}, "rotating_layers=0"),
    ({"rotating_layers": True}, "rotating_layers=True"),
    ({"group_sizes": [4, 5]}, "group_sizes"),
    ({"group_sizes": [4, 0]}, "group_sizes"),
    ({"group_sizes": [1]}, "group_sizes"),
    ({"group_sizes": []}, "group_sizes"),
    ({"group_sizes": 4}, "group_sizes"),
    ({"unscored": 0}, "unscored=0"),
    ({"unscored": 16}, "below 16"),
    ({"unscored": 8, "group_sizes": [32, 8]}, "below 8"),
    ({"dense_weight": 0}, "dense_weight=0"),
    ({"dense_weight": "3e0"}, "dense_weight='3e0'"),
    ({"skip_positions": "yes"}, "skip_positions"),
    ({"accumulation": 0}, "accumulation=0"),
    ({"accumulation": 2, "dense_weight": 3}, "Use dense_steps"),
    ({"parts": 1}, "parts=1"),
    ({"parts": 7}, "divide 96"),
    ({"parts": 2}, "dense_every=6 counts forwards"),
    ({"parts": 5, "group_sizes": [8]}, "divide 96"),
    ({"part_rate": 0.5}, "beside parts"),
]


def write(folder: Path, training: dict, **more) -> Path:
    path, config = folder / "study.yaml", {"group_size": 16, "dense_every": 6}
    study = dict(window=96, reference="a", config=config, cells=[dict(name="a", training=training)])
    path.write_text(yaml.safe_dump({**study, **more}))
    return path


@pytest.mark.parametrize("training, reason", REFUSED)
def test_a_course_outside_its_rules_is_refused(tmp_path, training, reason):
    with pytest.raises(ValueError, match=f"training of 'a': .*{reason}"):
        read_study(write(tmp_path, training))


@pytest.mark.parametrize("other", [{"group_sizes": [8]}, {"accumulation": 2}, {"dense_weight": 2}, {"unscored": 4}])
def test_parts_of_rows_stand_alone(tmp_path, other):
    with pytest.raises(ValueError, match="parts goes with"):
        read_study(write(tmp_path, {"parts": 2, **other}, config={"group_size": 16}))
    read_study(write(tmp_path, {"parts": 2, "part_rate": 0.5, "skip_positions": True}, config={"dense_every": 5}))


@pytest.mark.parametrize(
    "training, config, reason",
    [
        ({"group_sizes": [8]}, {"attention_pattern": "full"}, "'full' is dense in every step .* leave ..group_sizes"),
        ({"unscored": 4}, {"attention_pattern": "full"}, "leave ..unscored"),
        ({"rotating_layers": 1}, {"attention_pattern": "full"}, "leave ..rotating_layers"),
        ({"dense_steps": {"last": 1}}, {"attention_pattern": "full"}, "leave ..dense_steps"),
        ({"rotating_layers": 1}, {"dense_layers": [0]}, "takes the place of dense_layers"),
        ({"dense_weight": 2.0}, {"group_size": 16}, "neither dense_steps nor dense_every"),
    ],
)
def test_what_has_no_effect_is_refused(tmp_path, training, config, reason):
    with pytest.raises(ValueError, match=reason):
        read_study(write(tmp_path, training, config=config))


def test_records_have_no_tokens_to_weigh(tmp_path):
    with pytest.raises(ValueError, match="the loss of records"):
        read_study(write(tmp_path, {"unscored": 4}, data="records"))


def test_a_course_within_them_is_read(tmp_path):
    training = {"unscored": 15, "dense_weight": 0.5, "dense_steps": {"every": 3, "after": 0, "last": 2}}
    [cell] = read_study(write(tmp_path, {**training, "rotating_layers": 1})).cells
    assert training.items() <= cell.training.items()


def test_what_the_model_refuses():
    config = LongLoraConfig(attention_pattern="local", group_size=16)
    model = get_peft_model(LlamaForCausalLM(tiny_llama_config(num_hidden_layers=4)), config)
    for number in (3, 5):
        with pytest.raises(ValueError, match=f"rotating_layers={number} must divide 4"):
            Course(model, {"rotating_layers": number}, 4)
    with pytest.raises(ValueError, match="unscored=16 must be below 16"):
        Course(model, {"unscored": 16}, 4)
