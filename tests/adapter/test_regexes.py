"""Regular expressions of a stranger's adapter: what never ends is refused, what people use is taken."""

import json

import pytest
from peft import PeftModel

from peft_longlora import LongLoraConfig
from peft_longlora.adapter import regexes
from tests.helpers.tiny import assert_same, extend, make, snapshot

ENDLESS = r"([\w.]+)+!"


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ENDLESS},
        {"exclude_modules": ENDLESS},
        {"rank_pattern": {ENDLESS: 4}},
        {"alpha_pattern": {ENDLESS: 4}},
        {"modules_to_save": ["model.norm", ENDLESS]},
        {"layers_pattern": [ENDLESS], "layers_to_transform": [0]},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_pattern_that_never_ends_is_refused(fields, tmp_path, monkeypatch):
    monkeypatch.setattr(regexes, "SECONDS", 0.5)
    extend(make(), train_embeddings=False, train_norms=False).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"take longer than 0\.5 s .*Name the modules in a list"):
        PeftModel.from_pretrained(model, tmp_path)
    assert_same(snapshot(model), before)


def test_what_is_no_regular_expression_is_said():
    config = LongLoraConfig(target_modules=r"(.*q_proj.*", train_embeddings=False, train_norms=False)
    with pytest.raises(ValueError, match=r"q_proj.*cannot be used: .*unterminated .* Name the modules in a list"):
        regexes.check_patterns(config, make())


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(q|k|v)_proj",
        r"(?:.*?(?:text|language).*?(?:self_attn|attn).*?(?:q_proj|v_proj).*?)|(?:model\.layers\.[\d]{1,}\.self_attn\.q_proj)",
        r"^(?!.*vision).*(q_proj|v_proj)$",
        "all-linear",
    ],
)
def test_patterns_that_people_use_are_taken(pattern):
    assert any("lora_A" in name for name, _ in extend(make(), target_modules=pattern).named_parameters())
