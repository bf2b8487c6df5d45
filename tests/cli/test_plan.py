"""`longlora plan`: the printed plan against arithmetic done here, and what it refuses."""

import json
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from transformers import Gemma3TextConfig, LlamaConfig, MixtralConfig, OlmoHybridConfig

from peft_longlora import LongLoraConfig
from peft_longlora.cli import main
from peft_longlora.cli.plan import amount, size
from peft_longlora.memory.estimate import SHAPES
from peft_longlora.memory.rates import unlike_measured
from tests.helpers.paths import ROOT

EMBEDDED = str(ROOT / "examples" / "assets" / "stdlib-llama-512")


def plan(capsys, *options: object) -> tuple[int, str]:
    code = main.main(["plan", *map(str, options)])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def gib(text: str, name: str) -> float:
    return float(re.search(rf"^{name} +([\d.]+) GiB", text, flags=re.MULTILINE)[1])


def test_weights_adapter_and_optimiser_of_a_known_model(capsys):
    code, text = plan(capsys, "--model", "llama-3.1-8b", "--context", "32k", "--gpu-memory", "80GiB")
    assert code == 0
    assert gib(text, "weights") == pytest.approx(8_030_261_248 * 2 / 2**30, rel=1e-3)
    lora = 32 * 16 * 4096 * 2 + 32 * 16 * (4096 + 1024) * 2 + 32 * 16 * 4096 * 2  # q, k and v, o
    trained = lora + 128256 * 4096 + 65 * 4096
    assert gib(text, "adapter") == pytest.approx(trained * 4 / 2**30, abs=0.02)
    assert gib(text, "optimiser") == pytest.approx(trained * 8 / 2**30, abs=0.02)
    assert gib(text, "peak expected") <= gib(text, "budget") == pytest.approx(0.92 * 80, abs=0.01)
    assert "free=" in text and "an estimate from measured steps on one H100" in text


def test_time_and_price_follow_from_a_rate(capsys):
    options = ["--model", "llama-2-7b", "--context", 32768, "--gpu-memory", "80GB", "--tokens", "1B"]
    code, text = plan(capsys, *options, "--tokens-per-second", 10_000, "--price-per-hour", 3)
    assert code == 0
    hours = 1e9 / 10_000 / 3600
    assert f"{hours:.1f} hours, which cost {3 * hours:.2f}" in text and "3.3 s a step" in text


def test_a_row_that_does_not_fit_says_what_would_make_it_fit(capsys):
    options = ["--model", "llama-3.1-8b", "--context", "64k", "--gpu-memory", "24GiB"]
    code, text = plan(capsys, *options)
    assert code == 1 and "does not fit" in text and "It fits with --four-bit" in text
    code, text = plan(capsys, *options, "--four-bit")
    assert code == 0 and "does not fit" not in text
    code, text = plan(capsys, *options, "--four-bit", "--logits", "--accumulate")
    assert code == 1 and "It fits without --logits" in text
    assert gib(text, "logits") == pytest.approx(65536 * (128256 * 12) / 2**30, rel=0.01)


@pytest.mark.parametrize("gpus", [1, 2])
def test_what_is_advised_fits_and_what_is_not_does_not(capsys, gpus):
    """Several GPUs may share weights too: 131 GiB of them are whole on none."""
    options = ["--model", "llama-3.3-70b", "--context", "32k", "--gpu-memory", "80GB"]
    code, text = plan(capsys, *options, "--gpus", gpus)
    assert code == 1
    for more in (["--four-bit"], ["--no-embeddings"], ["--gpus", 2], ["--gpus", 4]):
        code, _ = plan(capsys, *options, *([] if "--gpus" in more else ["--gpus", gpus]), *more)
        assert (f"with {' '.join(map(str, more))}" in text) is (code == 0)


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "llama-2-7b", "--context", 1500, "--gpu-memory", "14.6GiB", "--no-embeddings"],
        ["--model", "llama-2-7b", "--context", "128k", "--gpu-memory", "80GB", "--gpus", 8, "--host-memory", "512GB"],
    ],
)
def test_no_longer_row_fits_than_the_longest(capsys, options):
    """Neither one that is no multiple of 1024, nor one for which the weights are shared."""
    code, text = plan(capsys, *options)
    most = int(re.search(r"longest row that fits: (\d+) tokens", text)[1])
    gpus = options[-3] if "--gpus" in options else 1
    assert code == 0 and most >= gpus * int(re.search(r"a step of (\d+) tokens", text)[1])
    options = [str(most + 1024 * gpus) if before == "--context" else one for before, one in pairwise(["", *options])]
    assert plan(capsys, *options)[0] == 1


def test_gradients_that_are_summed_stay_at_the_peak(capsys):
    options = ["--model", "llama-3.1-8b", "--context", "512k", "--gpu-memory", "80GiB"]
    peaks = [gib(plan(capsys, *options, *more)[1], "peak expected") for more in ([], ["--accumulate"])]
    assert peaks[1] - peaks[0] == pytest.approx(128256 * 4096 * 4 / 2**30, abs=0.02)


def test_what_comes_back_from_the_host_is_named(capsys):
    options = ["--model", "llama-3.1-8b", "--context", "128k", "--gpu-memory", "26GiB", "--four-bit"]
    code, text = plan(capsys, *options)
    assert code == 0 and "free=0, keep=0, keep_in_host=32" in text and "keep everything" not in text
    kept = 131072 * (4096 * 2 + 32 * 4) / 2**30  # one block's, half precision, with its log-sum-exp
    assert gib(text, "attention's output on its way back from the host") == pytest.approx(kept, abs=0.01)


def test_gpus_share_a_row(capsys):
    options = ["--model", "llama-3.1-8b", "--gpu-memory", "80GB"]
    _, one = plan(capsys, *options, "--context", "128k")
    code, two = plan(capsys, *options, "--context", "256k", "--gpus", 2, "--group-size", "32k")
    assert code == 0 and "weights whole on each GPU" in two and "buckets of DDP" not in one
    assert gib(two, "buckets of DDP") == gib(two, "adapter")  # single precision, as what is trained
    for name in ("weights", "adapter", "gradients", "optimiser", "working set of one block"):
        assert gib(one, name) == gib(two, name)


def test_a_tile_holds_less_than_a_row(capsys):
    """A row of 4096 tokens is one tile, as `checkpoint_blocks` computes it: nothing is saved."""
    options = ["--model", "llama-2-7b", "--gpu-memory", "14GiB", "--no-embeddings", "--context"]
    texts = [plan(capsys, *options, context)[1] for context in (4096, 4097)]
    assert "tile_tokens" not in texts[0] and "tile_tokens=4096" in texts[1]


def test_the_group_is_what_the_config_makes_of_the_row(capsys):
    options = ["--model", "llama-3.1-8b", "--gpu-memory", "80GiB", "--context"]
    for context, more in ((32768, []), (40966, []), (32768, ["--group-size", "64k"])):
        code, text = plan(capsys, *options, context, *more)
        expected = LongLoraConfig(context_length=context).group_size_on(context) if not more else context
        assert code == 0 and f"groups of {expected} tokens" in text and "No measured step" not in text


@pytest.mark.parametrize(
    ("options", "unlike"),
    [
        (["--model", EMBEDDED, "--context", "128k"], r"a width of \d+ \(2,048 to 4,096 measured\)\."),
        (
            ["--model", "llama-2-7b", "--context", "4k", "--group-size", "2k"],
            r"rows on one GPU of 4,096 \(32,768 to 524,288 measured",
        ),
        (
            ["--model", "llama-2-7b", "--context", "128k", "--gpus", "32", "--group-size", "8k"],
            "rows on one GPU of 4,096",
        ),
        (
            ["--model", "llama-2-7b", "--context", "32k", "--group-size", "256"],
            "groups of 256 .8,192 to 16,384 measured",
        ),
        (["--model", "llama-2-7b", "--context", "32k", "--four-bit", "--gpu", "H200"], "it has a base in 4 bits"),
        (["--model", "llama-2-7b", "--context", "16k", "--four-bit"], r"rows on one GPU of 16,384 \(131,072 measured"),
    ],
)
def test_a_step_unlike_all_measured_ones_is_said(capsys, options, unlike):
    code, text = plan(capsys, *options, "--gpu-memory", "80GB")
    assert code == 0 and re.search(f"No measured step is like this one.*{unlike}", text)
    assert "No measured step" not in plan(capsys, *options, "--gpu-memory", "80GB", "--tokens-per-second", 9)[1]


def test_a_4_bit_base_keeps_its_experts_and_is_not_advised_for_them(capsys, tmp_path):
    MixtralConfig().save_pretrained(tmp_path)
    options = ["--model", tmp_path, "--context", "8k", "--gpu-memory", "80GiB"]
    code, bits = plan(capsys, *options, "--four-bit")
    experts = 32 * 8 * 3 * 4096 * 14336 * 2 / 2**30
    assert code == 1 and gib(bits, "weights") > experts and "97% of the blocks' weights stay in 16 bits" in bits
    code, half = plan(capsys, *options)
    assert code == 1 and "It fits with" in half and "--four-bit" not in half


def test_blocks_with_a_state_are_said(capsys, tmp_path):
    for kind, other, more in ((OlmoHybridConfig, "linear", {}), (Gemma3TextConfig, "sliding", dict(sliding_window=64))):
        sizes = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, head_dim=64)
        sizes |= dict(num_key_value_heads=4, vocab_size=99, pad_token_id=0, **more)
        kind(layer_types=["full_attention", f"{other}_attention"], **sizes).save_pretrained(tmp_path)
        code, text = plan(capsys, "--model", tmp_path, "--context", "8k", "--gpu-memory", "80GiB")
        assert code == 0 and ("1 of 2 blocks hold a state" in text) == (other == "linear")


def test_experts_are_not_measured():
    assert unlike_measured(replace(SHAPES["llama-3.1-8b"], experts=8, active=2), 32768, 8192) == ["experts"]
    assert not unlike_measured(SHAPES["llama-3.1-8b"], 32768, 8192)
    assert not unlike_measured(SHAPES["llama-3.3-70b"], 131072, 32768)


def test_a_model_on_disk(capsys):
    code, text = plan(capsys, "--model", EMBEDDED, "--context", 4096, "--gpu-memory", "1GiB")
    assert code == 0 and "6 blocks" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu-memory", "24"], "'24' is not a size such as 24GiB or 80GB"),
        (["--gpu-memory", "24GiB", "--gpu", "abacus"], "--gpu abacus: no step was measured on it. Use one of H100"),
        (["--gpu-memory", "24GiB", "--price-per-hour", "-1"], "--price-per-hour -1.0 must be above 0"),
        (["--gpu-memory", "24GiB", "--tokens", "0M"], "is not a number of tokens such as 100M or 1B"),
        (["--gpu-memory", "24GiB", "--group-size", "7"], "--group-size 7 cannot be used: it must be an even number"),
        (["--gpu-memory", "24GiB", "--context", "none"], "'none' is not a number of 1 or more"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(capsys, options, message):
    given = ["plan", "--model", "llama-2-7b", "--context", "4096", *options]
    try:
        code = main.main(given)
    except SystemExit as stop:
        code = stop.code
    text = capsys.readouterr().err
    assert code == 2 and message in text and len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("hidden_size", -4096, "-4096 must be a whole number of 1 or more."),
        ("hidden_size", "abc", "'abc' must be a whole number of 1 or more."),
        ("num_hidden_layers", 0, "0 must be a whole number of 1 or more."),
        ("num_attention_heads", 0, "0 must be a whole number of 1 or more."),
        ("vocab_size", 1.5, "1.5 must be a whole number of 1 or more."),
        ("num_experts", -1, "-1 must be a whole number of 0 or more."),
    ],
)
def test_a_size_that_is_none_is_named_with_its_file(capsys, tmp_path, name, value, rule):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LlamaConfig().to_dict() | {name: value}))
    code, text = plan(capsys, "--model", tmp_path, "--context", 4096, "--gpu-memory", "24GiB")
    assert code == 2 and text == f"longlora plan: error: {file}: {name}={rule}\n"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[1, 2]", "config.json must hold an object of fields, and does not."),
        (json.dumps(LlamaConfig().to_dict() | {"num_attention_heads": None}), "'num_attention_heads' expected int"),
        ('{"model_type": "llama", ', "is not a valid JSON file."),
    ],
)
def test_a_config_that_cannot_be_read_is_refused_in_one_line(capsys, tmp_path, text, rule):
    (tmp_path / "config.json").write_text(text)
    code, said = plan(capsys, "--model", tmp_path, "--context", 4096, "--gpu-memory", "24GiB")
    assert code == 2 and rule in said and len(said.strip().splitlines()) == 1


def test_a_base_that_is_quantised_already(capsys, tmp_path):
    """In 4 bits its weights are those of --four-bit; another way's are not known, and it is said."""
    options = ["--model", tmp_path, "--context", 4096, "--gpu-memory", "24GiB"]
    config = LlamaConfig()
    config.save_pretrained(tmp_path)
    weights = gib(plan(capsys, *options, "--four-bit")[1], "weights")
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config.save_pretrained(tmp_path)
    code, text = plan(capsys, *options)
    assert code == 0 and gib(text, "weights") == weights < 4 and "stored in 4 bits" in text
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    code, text = plan(capsys, *options)
    assert gib(text, "weights") > 12 and "stored by 'gptq', and its weights are counted in 16 bits" in text


def test_sizes():
    assert size("24GiB") == 24 * 2**30 and size("1.5 gb") == 1.5e9
    assert amount("100M") == 10**8 and amount("2b") == 2 * 10**9 and amount("4k") == 4096
