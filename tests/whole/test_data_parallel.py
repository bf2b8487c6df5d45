"""Several processes as `accelerate launch` starts them, with the configurations of examples/accelerate, on CPUs.

What one process computes with the same global batch is the truth. Launching takes long, so by default only what one
process can show is tested here, and FSDP2 in tests/sequence; `pytest -m slow` of this file launches
them all (an hour on two busy cores, with bitsandbytes and deepspeed).
"""

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_longlora import LongLoraConfig
from tests.helpers.data_parallel import train
from tests.helpers.tiny import logits, make

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
HELPERS = ROOT / "tests" / "helpers"
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ZERO = [pytest.param("zero2", marks=needs_deepspeed), pytest.param("zero3", marks=needs_deepspeed)]
# DeepSpeed keeps small weights, which here are all, in every process. This shares out the last one.
EVERY_WEIGHT = pytest.param("zero3_every_weight", marks=needs_deepspeed)


def start(config: str, script: Path, *args, processes: int = 2, options: tuple = (), on_gpu: bool = False) -> list[str]:
    """The command line of a user, but for on_cpu.py."""
    path = (HELPERS if config == "zero3_every_weight" else CONFIGS) / f"{config}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", path]
    command += ["--main_process_port", 0, "--num_processes", processes, *options]
    scripts = [script] if on_gpu else [HELPERS / "on_cpu.py", script]
    return [str(part) for part in (*command, *scripts, *args)]


def is_on_gpu(command: list[str]) -> bool:
    return "accelerate.commands.launch" in command and not any(part.endswith("on_cpu.py") for part in command)


def run(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    if not is_on_gpu(command):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def launch(folder: Path, config: str, runs: list[dict], **kwargs) -> None:
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    result = run(start(config, HELPERS / "data_parallel.py", folder / "runs.json", **kwargs))
    assert result.returncode == 0, result.stderr[-5000:]


def launch_to_fail(folder: Path, config: str, runs: list[dict], **kwargs) -> str:
    """What a run that has to fail wrote to stderr. It ends by itself, or the timeout of `run` fails the test."""
    (folder / "runs.json").write_text(json.dumps(runs, default=str))
    result = run(start(config, HELPERS / "data_parallel.py", folder / "runs.json", **kwargs), timeout=120)
    assert result.returncode != 0
    return result.stderr


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    # bitsandbytes packs blocks of 64 weights: the third is wide enough for that
    sizes = {"untied": {}, "tied": {}, "wide": dict(hidden_size=128, intermediate_size=192)}
    for name, size in sizes.items():
        make(tie_word_embeddings=name != "untied", **size).save_pretrained(folder / name)
    return {name: folder / name for name in sizes}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the same training in one process, each done once."""
    done = {}

    def get(**settings) -> Path:
        key = json.dumps(settings, default=str)
        if key not in done:
            done[key] = tmp_path_factory.mktemp("alone")
            train(output=str(done[key]), batch_size=4, use_cpu=True, **settings)
        return done[key]

    return get


def read_losses(folder: Path) -> list[float]:
    return json.loads((folder / "losses.json").read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_equal_runs(found: Path, expected: Path, rtol: float = 1e-5) -> None:
    """Losses of every step, and what the last step left in each tensor."""
    assert read_losses(found) == pytest.approx(read_losses(expected), rel=rtol)
    tensors, truth = adapter(found), adapter(expected)
    assert tensors.keys() == truth.keys()
    for name, tensor in truth.items():
        # Adam divides small gradients by their own size, which magnifies rounding: 5e-3 is one step.
        torch.testing.assert_close(tensors[name].float(), tensor.float(), rtol=0, atol=5e-3 if rtol > 1e-4 else 1e-4)


def load(base: Path, folder: Path, dtype=torch.float32) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder).eval()


def assert_whole_adapter(base: Path, folder: Path) -> None:
    """It loads in one process, its copies differ from the base's weights, its ties hold, and it merges."""
    model = load(base, folder)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert not torch.equal(embeddings.weight, embeddings.original_module.weight)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            assert not torch.equal(module.weight, module.original_module.weight), name
    is_tied = model.config.tie_word_embeddings
    assert (embeddings.weight is head.weight) == is_tied
    before = logits(model)
    merged = model.merge_and_unload()
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == is_tied
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-3)


def test_ties_come_back_after_a_move_to_the_meta_device(bases):
    """What accelerate does with fsdp_cpu_ram_efficient_loading: the move unties, then it asks to tie again."""
    for name in ("tied", "untied"):
        base = AutoModelForCausalLM.from_pretrained(bases[name], attn_implementation="s2_attn")
        model = get_peft_model(base, LongLoraConfig(r=4, context_length=128, task_type="CAUSAL_LM")).to("meta")
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert embeddings.weight is not head.weight
        model.tie_weights()
        assert (embeddings.weight is head.weight) == (name == "tied")
        assert embeddings.weight.requires_grad and not embeddings.original_module.weight.requires_grad
        original_head = getattr(head, "original_module", head)
        assert (embeddings.original_module.weight is original_head.weight) == (name == "tied")


def test_an_adapter_without_its_weights_is_not_saved(tmp_path, bases):
    """DeepSpeed ZeRO-3 leaves empty tensors in the modules of every process."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases["tied"], attn_implementation="s2_attn"),
        LongLoraConfig(r=4, context_length=128),
    )
    state = model.state_dict()
    norm = model.base_model.model.model.norm.modules_to_save["default"]
    norm.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"norm\.modules_to_save\.default\.weight is empty.*get_state_dict"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, state_dict=state)  # the cure
    assert not torch.equal(adapter(tmp_path)["base_model.model.model.norm.weight"], torch.empty(0))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2_offload", *ZERO, EVERY_WEIGHT])
def test_every_strategy_trains_as_one_process_and_resumes(config, tmp_path, bases, alone):
    """float32 to 1e-5, bfloat16 to what it resolves; dropout on where a run is compared with itself resumed."""
    runs, checks = [], []
    for name in ("tied", "untied"):
        for dtype, bf16 in (("float32", False), ("bfloat16", True)):
            settings = dict(base=str(bases[name]), dtype=dtype, bf16=bf16)
            output = tmp_path / f"{name}-{dtype}"
            runs.append(dict(settings, output=output, batch_size=2))
            # FSDP2 as accelerate sets it up rounds the loss that it reports to bfloat16
            checks.append((output, settings, 8e-3 if bf16 else 1e-5))
    dropped = [dict(base=bases["tied"], output=tmp_path / n, batch_size=2, dropout=0.1) for n in ("whole", "rest")]
    dropped[1]["resume"] = tmp_path / "whole" / "checkpoint-2"
    launch(tmp_path, config, runs + dropped)
    for output, settings, rtol in checks:
        assert read_losses(output) == pytest.approx(read_losses(alone(**settings)), rel=rtol)
        if settings["dtype"] == "float32":
            assert_equal_runs(output, alone(**settings))
            assert_whole_adapter(Path(settings["base"]), output)
            assert_whole_adapter(Path(settings["base"]), output / "checkpoint-2")
        else:
            base = Path(settings["base"])
            models = [load(base, folder, torch.bfloat16) for folder in (output, alone(**settings))]
            found, expected = (logits(model).float() for model in models)
            assert (found - expected).abs().mean() < 0.02 * expected.std()
    assert read_losses(tmp_path / "rest") == read_losses(tmp_path / "whole")
    for name, tensor in adapter(tmp_path / "whole").items():
        assert torch.equal(adapter(tmp_path / "rest")[name], tensor), name


@pytest.mark.slow
def test_fsdp2_starts_from_one_copy_in_memory(tmp_path, bases, alone):
    """fsdp_cpu_ram_efficient_loading: only the first process reads the base, weights are untied and tied again."""
    runs = [dict(base=bases[name], output=tmp_path / name, batch_size=2) for name in ("tied", "untied")]
    scheduled = dict(base=str(bases["tied"]), dense_every=3)
    runs.append(dict(scheduled, output=tmp_path / "scheduled", batch_size=2))
    options = ("--fsdp_cpu_ram_efficient_loading", "true", "--fsdp_sync_module_states", "true")
    launch(tmp_path, "fsdp2", runs, options=options)
    assert read_losses(tmp_path / "scheduled") == pytest.approx(read_losses(alone(**scheduled)), rel=1e-5)
    for name in ("tied", "untied"):
        assert_equal_runs(tmp_path / name, alone(base=str(bases[name])))
        assert_whole_adapter(bases[name], tmp_path / name)


@pytest.mark.slow
@needs_bitsandbytes
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2_offload", *ZERO, EVERY_WEIGHT])
def test_a_base_of_4_bits_is_shared_out(config, tmp_path, bases, alone):
    """float32 beside the 4 bits, so that nothing but the order of sums may differ; in bfloat16 it has to run."""
    runs = [dict(base=str(bases["wide"]), is_four_bit=True), dict(base=str(bases["wide"]), is_four_bit=True)]
    runs[1].update(dtype="bfloat16", bf16=True)
    folders = [tmp_path / "float32", tmp_path / "bfloat16"]
    launch(tmp_path, config, [dict(r, output=f, batch_size=2) for r, f in zip(runs, folders, strict=True)])
    assert_equal_runs(folders[0], alone(**runs[0]))
    assert_whole_adapter(bases["wide"], folders[0])
    assert read_losses(folders[1]) == pytest.approx(read_losses(alone(**runs[1])), rel=8e-3)
    assert adapter(folders[1]).keys() == adapter(folders[0]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_a_schedule_of_dense_forwards_goes_on(config, tmp_path, bases):
    """The third and the sixth forward are dense; a run that resumes behind the fourth knows it."""
    settings = dict(base=bases["tied"], batch_size=2, steps=6, save_steps=4, dense_every=3)
    rest = dict(settings, output=tmp_path / "rest", resume=tmp_path / "whole" / "checkpoint-4")
    never = dict(settings, output=tmp_path / "never", dense_every=None)
    launch(tmp_path, config, [dict(settings, output=tmp_path / "whole"), rest, never])
    count = adapter(tmp_path / "whole" / "checkpoint-4")["base_model.model.s2_training_forwards"]
    assert count.tolist() == [4]
    whole = read_losses(tmp_path / "whole")
    assert read_losses(tmp_path / "rest") == pytest.approx(whole, rel=1e-5)
    assert abs(read_losses(tmp_path / "never")[-1] - whole[-1]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_checkpoints_of_two_processes_resume_on_one_and_back(config, tmp_path, bases, alone):
    base = bases["tied"]
    launch(tmp_path, config, [dict(base=base, output=tmp_path / "two", batch_size=2)])
    launch(tmp_path, config, [dict(base=base, output=tmp_path / "one", batch_size=4)], processes=1)
    two_to_one = dict(base=base, output=tmp_path / "2-1", batch_size=4, resume=tmp_path / "two" / "checkpoint-2")
    one_to_two = dict(base=base, output=tmp_path / "1-2", batch_size=2, resume=tmp_path / "one" / "checkpoint-2")
    launch(tmp_path, config, [two_to_one], processes=1)
    launch(tmp_path, config, [one_to_two])
    for name in ("two", "one", "2-1", "1-2"):
        assert_equal_runs(tmp_path / name, alone(base=str(base)))


@pytest.mark.slow
@pytest.mark.parametrize("config", ZERO)
def test_zero_refuses_another_number_of_processes_but_its_adapter_loads(config, tmp_path, bases):
    base = bases["tied"]
    launch(tmp_path, config, [dict(base=base, output=tmp_path / "two", batch_size=2)])
    resumed = dict(base=base, output=tmp_path / "one", batch_size=4, resume=tmp_path / "two" / "checkpoint-2")
    message = launch_to_fail(tmp_path, config, [resumed], processes=1)
    assert "used a DP world size of 2 but the current world size is 1" in message
    assert_whole_adapter(base, tmp_path / "two" / "checkpoint-2")


@pytest.mark.slow
@needs_deepspeed
def test_saving_by_hand_under_zero3_is_refused(tmp_path, bases):
    by_hand = dict(base=bases["tied"], output=tmp_path / "out", batch_size=2, save_by_hand=True)
    assert "DeepSpeed ZeRO-3 splits weights" in launch_to_fail(tmp_path, "zero3_every_weight", [by_hand])


# -- examples ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    words = ["def", "return", "import", "self", "class", "None", "for", "in", "if", "else", "while", "with", "raise"]
    for seed in range(4):
        picks = torch.randint(len(words), (1200,), generator=torch.Generator().manual_seed(seed)).tolist()
        (folder / f"{seed}.txt").write_text(" ".join(words[i] for i in picks))
    records = [dict(instruction=f"{words[i % 13]} " * (20 + 9 * i), input="", output="yes " * 9) for i in range(24)]
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2_offload", *ZERO])
@pytest.mark.parametrize("script", ["extend_context.py", "sft_longalpaca.py"])
def test_examples_under_accelerate_launch(script, config, tmp_path, texts):
    model = ROOT / "examples" / "assets" / "stdlib-llama-512"
    common = ["--model", model, "--max-steps", 2, "--warmup-steps", 1, "--learning-rate", 1e-3, "--accumulation", 1]
    if script == "extend_context.py":
        common += ["--data", *sorted(texts.glob("*.txt")), "--context-length", 256]
    else:
        common += ["--data", texts / "records.json", "--max-length", 256, "--no-packing"]
    one, two = tmp_path / "one", tmp_path / "two"
    script = ROOT / "examples" / script
    result = run([str(x) for x in (sys.executable, script, *common, "--batch-size", 2, "--output", one)])
    assert result.returncode == 0, result.stderr[-3000:]
    result = run(start(config, script, *common, "--batch-size", 1, "--output", two))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("The adapter is in") == 1
    found, expected = adapter(two), adapter(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    assert (two / "tokenizer.json").is_file() and (two / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2_offload", *ZERO])
def test_a_sequence_is_shared_under_accelerate_launch(config, tmp_path, texts):
    """Rows of an odd length, in two stretches; weights shared out over the same processes."""
    script, model = ROOT / "examples" / "long_sequence.py", ROOT / "examples" / "assets" / "stdlib-llama-512"
    common = ["--model", model, "--data", *sorted(texts.glob("*.txt")), "--context-length", 509, "--group-size", 128]
    common += ["--max-steps", 2, "--learning-rate", 1e-3, "--accumulation", 2, "--eval-rows", 2]
    one, two = tmp_path / "one", tmp_path / "two"
    alone = run([str(x) for x in (sys.executable, script, *common, "--output", one)])
    assert alone.returncode == 0, alone.stderr[-3000:]
    result = run(start(config, script, *common, "--output", two))
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("2 of 2 processes share a sequence.") == 1
    losses = [re.findall(r"dense attention: ([0-9.]+)", x.stdout) for x in (alone, result)]
    assert len(losses[0]) == 2 and [*map(float, losses[1])] == pytest.approx([*map(float, losses[0])], abs=2e-4)
    found, expected = adapter(two), adapter(one)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_compiled_model_shares_sequences(tmp_path, bases, alone):
    compiled = dict(is_shared=True, torch_compile=True, torch_compile_backend="eager")
    launch(tmp_path, "ddp", [dict(base=bases["tied"], output=tmp_path / "two", batch_size=4, **compiled)])
    assert_equal_runs(tmp_path / "two", alone(base=str(bases["tied"])))


# -- GPUs: pytest -m gpu tests/whole/test_data_parallel.py -------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_base")  # heads of 64: a size that every kernel takes
    sizes = dict(hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    make(tie_word_embeddings=True, **sizes).save_pretrained(folder)
    return folder


def gpu_runs(base: Path, folder: Path, batch_size: int) -> dict[str, dict]:
    runs = {
        "float32": {},
        "bfloat16": dict(dtype="bfloat16", bf16=True),
        "rest": dict(resume=folder / "float32" / "checkpoint-2"),
        "4bit": dict(is_four_bit=True),
    }
    if find_spec("bitsandbytes") is None:
        del runs["4bit"]
    # One gradient of these four rows is 1e-7 of their norm, less than GPUs round: with Adam's usual epsilon its sign
    # decides about a whole step of its weight, and everything after it.
    common = dict(base=base, batch_size=batch_size, adam_epsilon=1e-2)
    return {name: dict(run, output=folder / name, **common) for name, run in runs.items()}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory, gpu_base) -> Path:
    folder = tmp_path_factory.mktemp("one_gpu")
    launch(folder, "ddp", list(gpu_runs(gpu_base, folder, 4).values()), processes=1, on_gpu=True)
    return folder


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("config", ["ddp", "fsdp2", "fsdp2_offload", *ZERO])
def test_two_gpus_train_as_one(config, tmp_path, gpu_base, one_gpu):
    runs = gpu_runs(gpu_base, tmp_path, 2)
    launch(tmp_path, config, list(runs.values()), on_gpu=True)
    for name in runs:
        is_float32 = name != "bfloat16"
        found, expected = read_losses(tmp_path / name), read_losses(one_gpu / name)
        print(f"{config} {name}: {found} (one GPU: {expected})")
        assert found == pytest.approx(expected, rel=1e-4 if is_float32 else 8e-3)
        if is_float32:
            assert_equal_runs(tmp_path / name, one_gpu / name, rtol=1e-4)
            assert_whole_adapter(gpu_base, tmp_path / name)
        else:  # rounding decides which way it goes, but not how far from float32
            truth = logits(load(gpu_base, one_gpu / "float32"))
            models = [load(gpu_base, folder / name, torch.bfloat16) for folder in (tmp_path, one_gpu)]
            ours, theirs = ((logits(model).float() - truth).abs().mean() for model in models)
            assert ours < 1.25 * theirs


# -- faults --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", *ZERO])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_the_last_checkpoint_goes_on(config, rank, tmp_path, bases):
    whole, broken, rest = tmp_path / "whole", tmp_path / "broken", tmp_path / "rest"
    common = dict(base=bases["tied"], batch_size=2, dropout=0.1)
    begun = time.monotonic()
    fault = dict(kind="kill", rank=rank, step=3)
    message = launch_to_fail(tmp_path, config, [dict(common, output=broken, fault=fault)])
    assert time.monotonic() - begun < 100
    assert message.count("ChildFailedError:") == 1 and "Signal 9 (SIGKILL)" in message
    assert f"rank      : {rank}" in message
    assert not (broken / "checkpoint-4").exists()
    launch(tmp_path, config, [dict(common, output=whole), dict(common, output=rest, resume=broken / "checkpoint-2")])
    assert read_losses(rest) == read_losses(whole)
    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(rest)[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_a_job_whose_ranks_share_sequences(rank, tmp_path, bases, alone):
    base, broken, rest = bases["tied"], tmp_path / "broken", tmp_path / "rest"
    common = dict(base=base, batch_size=4, is_shared=True)
    fault = dict(kind="kill", rank=rank, step=3)
    begun = time.monotonic()
    message = launch_to_fail(tmp_path, "ddp", [dict(common, output=broken, fault=fault)])
    assert time.monotonic() - begun < 100
    assert message.count("ChildFailedError:") == 1 and "Signal 9 (SIGKILL)" in message
    launch(tmp_path, "ddp", [dict(common, output=rest, resume=broken / "checkpoint-2")])
    assert_equal_runs(rest, alone(base=str(base)))


@pytest.mark.slow
def test_a_slow_process_is_waited_for_until_the_timeout(tmp_path, bases, alone):
    common = dict(base=bases["tied"], batch_size=2)
    slow = dict(common, output=tmp_path / "slow", fault=dict(kind="sleep", rank=1, step=1, amount=8))
    launch(tmp_path, "fsdp2", [slow])
    assert_equal_runs(tmp_path / "slow", alone(base=str(bases["tied"])))
    hung = dict(common, output=tmp_path / "hung", fault=dict(kind="sleep", rank=1, step=3, amount=90), ddp_timeout=5)
    begun = time.monotonic()
    message = launch_to_fail(tmp_path, "fsdp2", [hung])
    assert time.monotonic() - begun < 80 and "Timed out" in message
    assert_whole_adapter(bases["tied"], tmp_path / "hung" / "checkpoint-2")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2", *ZERO])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(config, tmp_path, bases):
    """The write of the second checkpoint fails; with save_total_limit=1 the first would have gone after it."""
    whole, broken, rest = tmp_path / "whole", tmp_path / "broken", tmp_path / "rest"
    common = dict(base=bases["tied"], batch_size=2, save_total_limit=1)
    fault = dict(kind="fill", rank=0, step=4, amount=8192)
    message = launch_to_fail(tmp_path, config, [dict(common, output=broken, fault=fault)])
    assert "File too large" in message
    assert not (broken / "checkpoint-4" / "trainer_state.json").exists()
    assert_whole_adapter(bases["tied"], broken / "checkpoint-2")
    launch(tmp_path, config, [dict(common, output=whole), dict(common, output=rest, resume=broken / "checkpoint-2")])
    assert_equal_runs(rest, whole)


@pytest.mark.slow
def test_resuming_passes_over_a_checkpoint_that_was_cut_short(tmp_path, texts):
    """extend_context.py --resume, where the newest checkpoint has weights but no state: it was never finished."""
    model = ROOT / "examples" / "assets" / "stdlib-llama-512"
    common = ["--model", model, "--data", texts / "0.txt", "--context-length", 256, "--warmup-steps", 1]
    common += ["--accumulation", 1, "--save-steps", 1, "--learning-rate", 1e-3]

    def extend(name: str, *more) -> None:
        script = ROOT / "examples" / "extend_context.py"
        result = run(start("ddp", script, *common, "--output", tmp_path / name, *more))
        assert result.returncode == 0, result.stderr[-3000:]

    extend("whole", "--max-steps", 4)
    extend("parts", "--max-steps", 3)
    for name in ("trainer_state.json", "optimizer.pt"):
        (tmp_path / "parts" / "checkpoint-3" / name).unlink()
    extend("parts", "--max-steps", 4, "--resume")
    for name, tensor in adapter(tmp_path / "whole").items():
        torch.testing.assert_close(adapter(tmp_path / "parts")[name], tensor, rtol=0, atol=1e-6)
