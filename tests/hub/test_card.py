"""The card that every save leaves: what it says, that it runs, and what it does to a README that is there."""

import ast
import copy
import json
import logging
import re
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import peft_longlora
import peft_longlora.hub.card
from peft_longlora import LongLoraConfig
from peft_longlora.architecture import find_attention_modules
from peft_longlora.attention.settings import settings_of
from peft_longlora.hub.card import TEMPLATE, CardOptions, make_card, write_card
from peft_longlora.hub.readme import BEGIN, END, is_draft
from peft_longlora.hub.trainers import use_longlora_card
from tests.helpers.configs import tiny_llama_config
from tests.helpers.releases import own_adapters

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def adapted(base_folder) -> PeftModel:
    return adapt(base_folder)


def adapt(base_folder, **fields) -> PeftModel:
    base = LlamaForCausalLM.from_pretrained(base_folder, attn_implementation="s2_attn")
    config = LongLoraConfig(**{"r": 2, "context_length": 256, "init_lora_weights": False, **fields})
    return get_peft_model(base, config).eval()


def save(model, folder) -> str:
    model.save_pretrained(folder)
    return (folder / "README.md").read_text()


def row(text: str, name: str) -> str:
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", text, re.MULTILINE)[1]


def test_first_code_block_loads_the_adapter(adapted, tmp_path):
    text = save(adapted, tmp_path / "adapter")
    code = CODE.search(text)[1]
    assert code.startswith("import peft_longlora")
    names = {}
    exec(code, names)
    tokens = torch.arange(3, 83)[None]
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(tokens).logits, adapted(tokens).logits)


def test_metadata_of_a_base_in_a_folder_names_no_folder(adapted, tmp_path, base_folder):
    card = ModelCard(save(adapted, tmp_path / "adapter"))
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["longlora", "lora", "peft", "transformers"],
    }
    assert base_folder not in str(card)


def test_metadata_of_a_base_on_the_hub(adapted, tmp_path):
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = "me/base"
    config.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "me/base"
    assert "base_model:adapter:me/base" in card.data.tags
    assert 'base = "me/base"' in CODE.search(card.text)[1]


@own_adapters
def test_an_adapter_of_a_plain_transformers_model_has_the_card_too(base_folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(base_folder, attn_implementation="s2_attn").eval()
    model.add_adapter(LongLoraConfig(r=2, context_length=256, init_lora_weights=False))
    names = {}
    exec(CODE.search(save(model, tmp_path / "adapter"))[1], names)
    tokens = torch.arange(3, 83)[None]
    with torch.no_grad():
        assert torch.equal(names["model"].eval()(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "fields, window, group",
    [
        ({}, 256, 64),
        ({"rope_type": "linear", "group_size": 32}, 256, 32),
        ({"rope_type": "ntk", "attention_pattern": "local", "dense_layers": [1]}, 256, 64),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 6.0}, "context_length": None, "group_size_ratio": 0.5},
            64 * 6,
            32,
        ),
        (
            {
                "attention_pattern": "full",
                "train_embeddings": False,
                "train_norms": False,
                "target_modules": ["q_proj"],
            },
            256,
            64,
        ),
        ({"context_length": 32}, 64, 8),
        ({"attention_pattern": "local", "dense_every": 3}, 256, 64),
        ({"attention_pattern": "local", "skip_positions": True}, 256, 64),
    ],
    ids=str,
)
def test_card_says_what_the_model_does(base_folder, tmp_path, fields, window, group):
    """Against the model itself: its config's RoPE, its attention's settings, its parameters."""
    model = adapt(base_folder, **fields)
    text = save(model, tmp_path / "adapter")
    assert row(text, "window before") == "64 tokens"
    assert row(text, "window after") == f"{window} tokens"
    rope = row(text, "RoPE")
    if window > 64 or "rope_parameters" in fields:
        assert json.loads(rope.strip("`")) == model.config.rope_parameters
    else:
        assert rope == "unchanged"
    settings = [settings_of(module) for module in find_attention_modules(model).values()]
    pattern = row(text, "attention while training")
    assert pattern.startswith(f"`{settings[0].pattern}`")
    if settings[0].pattern != "full":
        assert f"groups of {group} tokens" in pattern and settings[0].group_size == group
    dense = "; dense in layers 1" in pattern
    assert dense == (fields.get("dense_layers") == [1])
    every = "; one training forward in 3 dense in every layer" in pattern
    assert every == (settings[0].schedule.dense_every == 3)
    assert ("; positions skip inside groups" in pattern) == settings[0].schedule.skip_positions
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert row(text, "input embeddings").startswith("yes") == any("embed_tokens" in name for name in trained)
    assert row(text, "norms").startswith("yes") == any("norm" in name for name in trained)
    on = {name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if any(f"{name}.lora_A" in t for t in trained)}
    assert set(re.findall(r"`(\w+)`", row(text, "LoRA on"))) == on


def test_card_of_a_base_that_is_scaled_already(tmp_path):
    """transformers keeps the length before scaling in its config, and the factor beside it."""
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    LlamaForCausalLM(tiny_llama_config(rope_parameters=rope)).save_pretrained(tmp_path / "base")
    text = save(adapt(str(tmp_path / "base"), context_length=None), tmp_path / "adapter")
    assert "The window stays at 256 tokens." in text
    assert row(text, "attention while training").startswith("`s2`: groups of 64 tokens")
    longer = adapt(str(tmp_path / "base"), context_length=None, rope_parameters={**rope, "factor": 16.0})
    text = save(longer, tmp_path / "longer")
    assert "It extends the window from 256 to **1,024 tokens**." in text
    assert row(text, "attention while training").startswith("`s2`: groups of 64 tokens")


def test_saving_twice_changes_nothing(adapted, tmp_path):
    assert save(adapted, tmp_path / "adapter") == save(adapted, tmp_path / "adapter")


def test_text_outside_the_marks_stays_and_what_is_inside_is_new(adapted, tmp_path):
    text = save(adapted, tmp_path)
    (tmp_path / "README.md").write_text(text.replace(BEGIN, f"Before.\n\n{BEGIN}").replace(END, f"{END}\n\nAfter."))
    adapted.peft_config["default"].lora_dropout = 0.25
    text = save(adapted, tmp_path)
    assert "Before." in text[: text.index(BEGIN)] and "After." in text[text.index(END) :]
    assert "dropout = 0.25" in text and text.count("# Use") == 1


def test_a_readme_of_the_users_own_keeps_its_text(adapted, tmp_path, caplog):
    mine = "---\nlicense: mit\nlanguage: de\ntags:\n- mine\n---\n# Mein Modell\n\nVon Hand geschrieben.\n"
    (tmp_path / "README.md").write_text(mine)
    card = ModelCard(save(adapted, tmp_path))
    assert "# Mein Modell\n\nVon Hand geschrieben." in card.text and BEGIN not in card.text
    assert (card.data.license, card.data.language, card.data.library_name) == ("mit", "de", "peft")
    assert {"longlora", "lora", "peft"} <= set(card.data.tags)


def test_metadata_a_user_added_stays_and_is_shown(adapted, tmp_path):
    card = ModelCard(save(adapted, tmp_path))
    card.data.license, card.data.datasets = "cc-by-4.0", ["me/books"]
    card.save(tmp_path / "README.md")
    card = ModelCard(save(adapted, tmp_path))
    assert (card.data.license, card.data.datasets) == ("cc-by-4.0", ["me/books"])
    assert "\ncc-by-4.0.\n" in card.text and "https://huggingface.co/datasets/me/books" in card.text


def test_what_libraries_draft_is_known_as_such(adapted, tmp_path):
    from transformers.modelcard import TrainingSummary
    from trl.trainer.utils import generate_model_card

    (tmp_path / "peft").mkdir()
    PeftModel.create_or_update_model_card(adapted, tmp_path / "peft")
    peft = ModelCard.load(tmp_path / "peft" / "README.md").text
    description = "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    hub = ModelCard.from_template(ModelCardData(), model_description=f"{description}It was generated.").text
    trl = generate_model_card("me/base", "adapter", "me/adapter", "me/books", ["sft"], None, None, "SFT").text
    trainer = ModelCard(TrainingSummary("adapter", finetuned_from="me/base", hyperparameters={}).to_model_card()).text
    for text in (peft, hub, trl, trainer, ""):
        assert is_draft(text)
    for text in (peft, hub):
        assert not is_draft(f"{text}\nWritten by hand.\n")
        assert not is_draft(text.replace("[More Information Needed]", "Jane Doe", 1))
    assert not is_draft(f"{trl}\n## How I made it\n\nBy hand.\n")


PERPLEXITY = {"task": "perplexity", "protocol": "documents", "dataset": "pg19", "length": 256, "metric": "perplexity"}
RESULTS = {
    "schema_version": 1,
    "notes": ["only the first window of each document; 181 | windows were left out"],
    "results": [
        {**PERPLEXITY, "variant": "base", "value": 93.0, "low": 90.0, "high": 96.5, "units": 4, "beyond_window": True},
        {**PERPLEXITY, "variant": "adapter", "value": 7.5, "low": None, "high": None},
        {**PERPLEXITY, "task": "native", "variant": "adapter", "value": 8.125, "low": 7.000004, "high": 9.1},
        {"task": "passkey", "dataset": "passkey", "metric": "accuracy", "value": 0.98, "beyond_window": True},
        {"task": "cost", "dataset": "random", "length": 256, "metric": "kv_cache_bytes", "value": 12582912.0},
    ],
}


def test_results_beside_the_adapter_are_shown_and_indexed(adapted, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "curve.png").write_bytes(b"\x89PNG")
    text = save(adapted, tmp_path)
    assert (
        "| perplexity | documents | pg19 | 256† | perplexity | base | 93 [90, 96.5] | 4 |\n"
        "| perplexity | documents | pg19 | 256 | perplexity | adapter | 7.5 |  |\n"
        "| native | documents | pg19 | 256 | perplexity | adapter | 8.125 [7, 9.1] |  |\n"
        "| passkey |  | passkey | † | accuracy | adapter | 0.98 |  |\n"
        "| cost |  | random | 256 | kv_cache_bytes | adapter | 12,582,912 |  |\n"
    ) in text
    assert "Brackets are intervals over them." in text and "\n† above the window that the model was made for.\n" in text
    assert "too few" not in text, "of a row that names no number of documents nothing is known"
    assert "\n- only the first window of each document; 181 \\| windows were left out\n" in text
    assert "![curve.png](curve.png)" in text
    results = ModelCard(text).data.eval_results
    assert all(isinstance(result, EvalResult) for result in results)
    # The base's numbers are no claim of this model's, and costs are the machine's.
    assert {(r.task_name, r.dataset_name, r.metric_type, r.metric_name, r.metric_value) for r in results} == {
        ("perplexity", "pg19", "perplexity", "perplexity, documents, 256", 7.5),
        ("native", "pg19", "perplexity", "perplexity, documents, 256", 8.125),
        ("passkey", "passkey", "accuracy", "accuracy, beyond the window", 0.98),
    }
    assert text == save(adapted, tmp_path)


def test_without_intervals_no_sentence_is_about_brackets(adapted, tmp_path):
    plain = [{**row, "low": None, "high": None} for row in RESULTS["results"]]
    (tmp_path / "results.json").write_text(json.dumps({"results": plain, "notes": [3, None]}))
    text = save(adapted, tmp_path)
    assert "| adapter | 7.5 |" in text and "Brackets" not in text and "[" not in row(text, "perplexity")
    assert "A value without brackets has too few of them for an interval." in text  # the base's four documents


def test_results_of_another_folder_come_along(adapted, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"results='?.*out'? has no results.json. Name the folder"):
        use_longlora_card(adapted, results=tmp_path / "out")
    (tmp_path / "out" / "results.json").write_text(json.dumps(RESULTS))
    (tmp_path / "out" / "curve.png").write_bytes(b"\x89PNG")
    use_longlora_card(adapted, results=tmp_path / "out")
    assert "![curve.png](curve.png)" in save(adapted, tmp_path / "adapter")
    assert {"results.json", "curve.png"} <= {path.name for path in (tmp_path / "adapter").iterdir()}


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        json.dumps({**RESULTS, "schema_version": 2}),
        json.dumps({"results": [{**RESULTS["results"][2], "value": "good"}]}),
        json.dumps({"results": [{**RESULTS["results"][2], "value": float("nan")}]}),
    ],
)
def test_results_that_cannot_be_read_cost_the_card_and_not_the_adapter(adapted, tmp_path, content, caplog):
    (tmp_path / "results.json").write_text(content)
    with caplog_of_transformers(caplog):
        adapted.save_pretrained(tmp_path)
    assert re.search(r"results.json cannot be used for the card: .*Correct or remove it", caplog.text)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size > 0
    with pytest.raises(ValueError, match=r"results.json cannot be used"):
        write_card(adapted.peft_config["default"], tmp_path)


@contextmanager
def caplog_of_transformers(caplog):
    """transformers' loggers do not pass their records on, so pytest's handler must be put on them."""
    logger = logging.getLogger("peft_longlora")
    logger.addHandler(caplog.handler)
    try:
        yield
    finally:
        logger.removeHandler(caplog.handler)


def test_results_behind_a_link_out_of_the_folder_are_refused(adapted, tmp_path, caplog):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps(RESULTS))
    (tmp_path / "secret.png").write_bytes(b"\x89PNG")
    folder = tmp_path / "adapter"
    text = save(adapted, folder)
    (folder / "results.json").symlink_to(secret)
    (folder / "plot.png").symlink_to(tmp_path / "secret.png")
    with caplog_of_transformers(caplog):
        assert "plot.png" not in save(adapted, folder)
    assert "out of the adapter's folder" in caplog.text
    assert "perplexity" not in text


def test_a_card_behind_a_link_is_replaced_not_followed(adapted, tmp_path):
    """As in a snapshot of the Hub's cache, where README.md is a link to a file that others share."""
    (tmp_path / "shared").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").symlink_to(tmp_path / "shared")
    config = adapted.peft_config["default"]
    config.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "shared").read_text() == "---\nlicense: mit\n---\n"
    assert BEGIN in (tmp_path / "adapter" / "README.md").read_text()


def test_a_template_of_ones_own(adapted, tmp_path):
    template = tmp_path / "mine.md"
    template.write_text("---\n{{ card_data }}\n---\n# {{ name }}\n{{ window }} tokens by {{ rope_json }}\n")
    use_longlora_card(adapted, template=template, license="mit", tags="books")
    for _ in range(2):
        card = ModelCard(save(adapted, tmp_path / "adapter"))
    assert card.text.strip().splitlines()[1:3] == [
        "# adapter",
        f"256 tokens by {json.dumps(adapted.config.rope_parameters, sort_keys=True)}",
    ]
    assert card.data.license == "mit" and "books" in card.data.tags


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("---\n{{ card_data }}\n---\n\n{% if %}\n", "line 5 gives no card: .*Start from"),
        ("# {{ name }}\n", "renders no metadata. Start it with"),
        (None, "gives no card: FileNotFoundError"),
    ],
)
def test_a_template_that_is_none_is_refused_at_once(adapted, tmp_path, content, message):
    template = tmp_path / "mine.md"
    if content is not None:
        template.write_text(content)
    with pytest.raises(ValueError, match=message):
        use_longlora_card(adapted, template=template)


def test_metadata_that_is_no_yaml_is_refused_with_its_file(adapted, tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(ValueError, match=r"README.md cannot be read: .*Correct it, or delete"):
        write_card(adapted.peft_config["default"], tmp_path)


def test_text_from_a_config_is_never_code(adapted):
    config = adapted.peft_config["default"]
    evil = '"); open("trap", "w"); print("'
    config.base_model_name_or_path = evil
    for adapter, subfolder in ((evil, None), ("me/adapter", evil)):
        block = CODE.search(str(make_card(config, adapter, subfolder=subfolder)))[1]
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        assert {getattr(call.func, "attr", None) for call in calls} == {"from_pretrained"}


def test_a_model_without_our_adapter_is_refused(llama):
    with pytest.raises(ValueError, match=r"has no LongLoRA adapter. Add one with get_peft_model"):
        use_longlora_card(llama)


def test_template_ships_with_the_package():
    assert TEMPLATE.is_file() and Path(peft_longlora.__file__).parent in TEMPLATE.parents


def test_a_checkpoint_brings_a_card_to_the_folder_that_a_trainer_pushes(adapted, tmp_path):
    mine = tmp_path / "mine" / "README.md"
    mine.parent.mkdir()
    mine.write_text("# Mine\n\nI wrote this.\n")
    for folder in ("run/checkpoint-3", "mine/checkpoint-3", "other/best-3"):
        adapted.save_pretrained(tmp_path / folder)
        assert BEGIN in (tmp_path / folder / "README.md").read_text()
    assert f'adapter = "{tmp_path}/run"' in (tmp_path / "run" / "README.md").read_text()
    assert mine.read_text() == "# Mine\n\nI wrote this.\n"
    assert not (tmp_path / "other" / "README.md").exists()


@pytest.fixture
def written(monkeypatch) -> list:
    """The READMEs that were written, in order."""
    paths, write = [], peft_longlora.hub.card.write_whole
    monkeypatch.setattr(
        peft_longlora.hub.card, "write_whole", lambda path, text: (paths.append(path), write(path, text))
    )
    return paths


def test_a_save_writes_each_card_once(adapted, tmp_path, written):
    adapted.save_pretrained(tmp_path)
    assert written == [tmp_path / "README.md"]
    adapted.add_adapter("second", LongLoraConfig(r=3, context_length=256))
    written.clear()
    adapted.save_pretrained(tmp_path)
    assert written == [tmp_path / "README.md", tmp_path / "second" / "README.md"]


def test_adapters_in_folders_of_their_own_have_one_card_above(llama, tmp_path, written):
    model = get_peft_model(llama, LongLoraConfig(r=2, context_length=256), "first")
    model.save_pretrained(tmp_path)
    assert written == [tmp_path / "README.md", tmp_path / "first" / "README.md"]
    assert 'subfolder="first"' in (tmp_path / "README.md").read_text()


def test_a_trainers_checkpoint_writes_its_card_and_the_one_above_once(adapted, tmp_path, written):
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 63).view(2, 30)]
    args = TrainingArguments(
        tmp_path, max_steps=2, save_steps=2, per_device_train_batch_size=1, report_to="none", use_cpu=True
    )
    Trainer(adapted, args, train_dataset=rows).train()
    assert written == [tmp_path / "checkpoint-2" / "README.md", tmp_path / "README.md"]


def test_tags_of_the_base_reach_the_card(adapted, tmp_path):
    adapted.get_base_model().add_model_tags(["law"])
    assert {"law", "longlora"} <= set(ModelCard(save(adapted, tmp_path)).data.tags)
    assert "law" not in (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("above", [False, True])
@pytest.mark.parametrize(
    "raw", ["R\xe9sum\xe9".encode("latin-1"), b"---\na: [1\n---\nmine\n", b"---\n- a\n---\nmine\n"]
)
def test_a_readme_that_cannot_be_read_stops_no_save(adapted, tmp_path, raw, above):
    (tmp_path / "README.md").write_bytes(raw)
    folder = tmp_path / "checkpoint-100" if above else tmp_path
    adapted.save_pretrained(folder)
    assert (folder / "adapter_model.safetensors").is_file() and (folder / "adapter_config.json").is_file()
    assert (tmp_path / "README.md").read_bytes() == raw, "it is a person's"
    assert not above or BEGIN in (folder / "README.md").read_text()


ODD = [
    "a|b",
    "task\n\n# Injected\n",
    "<img src=x onerror=alert(1)>",
    END,
    "```\n# Injected",
    "a\x1b[31mred\u202eder",
    "`x`",
]


@pytest.mark.parametrize("odd", ODD)
def test_text_of_others_stays_text(adapted, tmp_path, odd):
    """In results, data sets, the folder's name and the config, whoever wrote them."""
    folder = tmp_path / odd.replace("/", "")
    folder.mkdir()
    row = {"task": odd, "dataset": odd, "metric": odd, "protocol": odd, "variant": odd, "value": 1.0}
    (folder / "results.json").write_text(json.dumps({"results": [row], "notes": [odd]}))
    config = copy.deepcopy(adapted.peft_config["default"])
    config.target_modules, config.modules_to_save, config.lora_alpha, config.peft_version = {odd}, [odd], odd, odd
    config.applied_rope_parameters = {**config.applied_rope_parameters, "note": odd}
    config.card = CardOptions(datasets=[odd], license=odd)
    text = write_card(config, folder).read_text()
    body = ModelCard(text).text
    assert "# Injected" not in body.splitlines() and "\x1b" not in body and "\u202e" not in body
    assert "<img" not in re.sub("`[^`]*`", "", body), "but as inline code"
    assert body.count(BEGIN) == body.count(END) == 1 and body.rstrip().endswith(END)
    [line] = [line for line in body.splitlines() if line.endswith("| 1 |  |")]
    assert len(re.findall(r"(?<!\\)\|", line)) == 9, "a row of eight cells"
    compile(CODE.search(body)[1], "card", "exec")
    for _ in range(2):
        assert write_card(config, folder).read_text() == text
