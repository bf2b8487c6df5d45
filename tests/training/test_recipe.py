"""What a recipe may say: every key and value is checked, and the error names the key, the value and the cure."""

from pathlib import Path
from typing import Literal

import pytest
import yaml

from peft_longlora.training import read_recipe
from peft_longlora.training.checkpoints import TRAINED_ON, TRAINED_WITH
from peft_longlora.training.recipe import RUN, TRAINER, keys, own_recipes
from peft_longlora.training.values import convert
from tests.helpers.paths import ROOT

pytest.importorskip("trl")
LEAST = {"model": "base", "data": "books", "context_length": 1024}


def write(folder: Path, text: str) -> Path:
    (folder / "mine.yaml").write_text(text)
    return folder / "mine.yaml"


def words(**given) -> list[str]:
    return [word for name, value in {**LEAST, **given}.items() for word in (f"--{name}", str(value))]


def test_a_file_and_the_command_line(tmp_path):
    path = write(
        tmp_path,
        "model: base\ndata: [a.txt, b.txt]\ncontext_length: 32k\nr: 4\nlearning_rate: 2e-5\nlr_scheduler_type: cosine\n"
        "rope_parameters: {rope_type: yarn, factor: 4.0, original_max_position_embeddings: 8192}\nreport_to: wandb\n",
    )
    recipe = read_recipe(
        path, ["--learning-rate", "1e-3", "--data", "c", "d", "--no-packing", "--use-rslora", "--r=16"]
    )
    assert (recipe.name, recipe.output_dir) == ("mine", Path("runs/mine"))
    assert recipe.values["learning_rate"] == 1e-3 and recipe.values["packing"] is False
    assert recipe.run.data == ["c", "d"] and recipe.run.model == "base"
    config = recipe.config
    assert (config.r, config.context_length, config.use_rslora, config.task_type) == (16, 32768, True, "CAUSAL_LM")
    assert config.rope_parameters["factor"] == 4.0


def test_words_are_read_as_people_mean_them(tmp_path):
    """`no` is a language and a strategy, and false where only true or false is allowed; a number may be a name."""
    least = "".join(f"{name}: {value}\n" for name, value in LEAST.items())
    text = "language: [no, en]\neval_strategy: no\npacking: off\nuse_rslora: yes\nrun_name: 2026-01-02\n"
    text += "model_revision: 0123456\nseed: 0\nweight_decay: 0.01\ngradient_checkpointing_kwargs: {use_reentrant: no}\n"
    values = read_recipe(write(tmp_path, least + text + "init_lora_weights: no\nmax_grad_norm: 0x10\n")).values
    expected = dict(language=["no", "en"], eval_strategy="no", packing=False, use_rslora=True, run_name="2026-01-02")
    expected |= dict(model_revision="0123456", seed=0, weight_decay=0.01, init_lora_weights=False, max_grad_norm=16.0)
    expected |= dict(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert {name: values[name] for name in expected} == expected
    given = read_recipe(None, [*words(), "--eval-strategy", "no", "--packing", "no", "--language", "no"]).values
    assert (given["eval_strategy"], given["packing"], given["language"]) == ("no", False, ["no"])
    with pytest.raises(ValueError, match="seed='010' is not a whole number"):
        read_recipe(None, words(seed="010"))


def test_the_command_line_alone():
    assert read_recipe(None, words()).run.data == ["books"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(learning_rat=1), "learning_rat: no such key. Did you mean learning_rate"),
        (dict(zzzzzz=1), "zzzzzz: no such key. --keys lists all"),
        (dict(learning_rate="fast"), "learning_rate='fast' is not a number"),
        (dict(learning_rate=-1), "learning_rate=-1.0 must be above 0"),
        (dict(learning_rate=float("inf")), "learning_rate=inf must be above 0, and finite"),
        (dict(embedding_learning_rate=float("inf")), "embedding_learning_rate=inf must be above 0, and finite"),
        (dict(context_length=1.5), "context_length=1.5 is not a whole number"),
        (dict(max_steps=0), "max_steps=0 must be 1 or more"),
        (dict(max_length=2048), "max_length=2048, the tokens of a row, must be 3 to context_length=1024"),
        (dict(lr_scheduler_type="cosin"), "Did you mean 'cosine'"),
        (dict(kind="recods"), "kind='recods' is not 'text' or 'records'. Did you mean 'records'"),
        (dict(packing="maybe"), "packing='maybe' is not true or false"),
        (dict(use_dora="1"), "use_dora=1 is not true or false"),
        (dict(group_size=3), "group_size=3 cannot be used: it must be an even number"),
        (dict(rope_type="yam"), "rope_type='yam' is unknown"),
        (dict(vocab_size=5), "this key is filled in by the command"),
        (dict(resume_from_checkpoint="x"), "goes on from the last checkpoint"),
        (dict(model=""), "model is missing"),
        (dict(eval_lengths=1), r"eval_lengths=\[1\] must be 2 tokens or more"),
        (dict(sequence_parallel=0), "sequence_parallel=0 must be above 0"),
    ],
)
def test_refused(given, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(None, words(**given))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", r"mine\.yaml: not YAML at line 2, column 1: model stands twice"),
        (f"a: {'[' * 900}", r"mine\.yaml: not YAML: maximum recursion depth"),
        ("model: [a\n", r"mine\.yaml: not YAML at line 2"),
        ("- model\n", "a recipe is a list of `key: value` lines"),
        ("", "a recipe is a list of `key: value` lines"),
        ("3: 4\n", "3: no such key"),
        ("model: a\ndata: b\n", "context_length is missing"),
        ("seed: 010\n", r"seed='010' is not a whole number.*YAML 1\.1 reads as 8\. Write 10, or 8"),
        ("save_steps: 1:30\n", r"save_steps='1:30' is not a number.*with colons, which YAML 1\.1 reads as 90"),
        ("seed: -0_7\n", "seed='-0_7' is not"),
        ("seed: 089\n", "seed='089' is not a whole number.*a zero before it. Write one plain number"),
        ("eval_lengths: [010]\n", "eval_lengths='010' is not a whole number"),
        ("seed: .inf\n", "seed=inf is not a whole number"),
        ("packing: nope\n", "packing='nope' is not true or false"),
    ],
)
def test_files_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_recipe(write(tmp_path, text))


@pytest.mark.parametrize("name", sorted(own_recipes()))
def test_a_recipe_of_the_package_by_its_name(tmp_path, monkeypatch, name):
    """Some names have a dot, such as llama-3.1-8b-256k."""
    monkeypatch.chdir(tmp_path)
    said = yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())
    for given in (name, f"recipes/{name}.yaml"):
        recipe = read_recipe(given, ["--r", "2"])
        assert recipe.output_dir == Path(f"runs/{name}") and recipe.name == name
        assert recipe.config.context_length == said["context_length"]


def test_no_such_file_and_no_key():
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: no such recipe.*llama-2-7b-32k, .*smollm2-135m-32k"):
        read_recipe("none.yaml")
    with pytest.raises(ValueError, match="5: a value without a key"):
        read_recipe(None, ["5"])


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        ("2e-4", float, 2e-4), ("8k", int, 8192), ("8K", int | None, 8192), (3.0, int, 3), (None, int | None, None),
        ("x", list[str], ["x"]), ([1, "2"], list[int], [1, 2]), ("1", str | list[str] | None, "1"),
        (True, str | bool, True), ({"a": 1}, dict[str, int] | None, {"a": 1}),
        ([[0, 4]], list[tuple[int, int]], [(0, 4)]),
        ("pissa_niter_4", bool | Literal["pissa", "pissa_niter_[number of iters]"], "pissa_niter_4"),
    ],
)  # fmt: skip
def test_values(value, kind, expected):
    assert convert("key", value, kind) == expected


def test_every_default_is_of_its_type():
    """So that a recipe may write any default down."""
    for key in keys().values():
        if type(key.default).__module__ == "builtins" and key.default not in ("", []):
            convert(key.name, key.default, key.kind)


def test_a_model_in_place_of_a_recipe_is_said(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"this is a model, not a recipe. Give it with --model "):
        read_recipe(tmp_path)


def test_each_key_of_ours_says_whether_a_run_may_go_on_with_another_value():
    """A key that changes what is learned must not: the card would say what only the last steps were trained with."""
    free = {
        *("about", "attn_backend", "dense_attention", "fit_memory", "eval_data", "eval_split", "eval_lengths"),
        *("eval_windows", "license", "language", "tags", "overwrite"),
    }
    assert {name for name, key in keys().items() if key.owner == RUN} - TRAINED_ON == free
    assert {name for name, key in keys().items() if key.owner == TRAINER} >= TRAINED_WITH
