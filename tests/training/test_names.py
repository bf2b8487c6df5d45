"""Names of modules in a recipe: trained is what PEFT itself trains for the same names, and typos are refused."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from peft_longlora.training.names import as_names
from peft_longlora.training.values import convert

pytest.importorskip("trl", minversion="1.16")
ALONE = ("--no-train-embeddings", "--no-train-norms", "--dry-run")


def trained_by_peft(place, **given) -> int:
    base = AutoModelForCausalLM.from_pretrained(place / "base")
    return get_peft_model(base, LoraConfig(r=4, **given)).get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(
    ("words", "given"),
    [
        (["--target-modules", "q_proj,v_proj"], dict(target_modules=["q_proj", "v_proj"])),
        (["--target-modules", "q_proj, v_proj"], dict(target_modules=["q_proj", "v_proj"])),
        (["--target-modules", "q_proj", "mlp.up_proj,k_proj"], dict(target_modules=["q_proj", "up_proj", "k_proj"])),
        (["--target-modules", "q_proj", "--target-modules", "k_proj"], dict(target_modules=["q_proj", "k_proj"])),
        (["--target-modules", "q_proj"], dict(target_modules=["q_proj"])),
        (["--target-modules", r".*layers\.1\..*(q|up)_proj"], dict(target_modules=r".*layers\.1\..*(q|up)_proj")),
        (["--target-modules", "all-linear"], dict(target_modules="all-linear")),
        (["--target-modules", "q_proj,k_proj", "--exclude-modules", "k_proj"], dict(target_modules=["q_proj"])),
        (["--target-modules", "q_proj", "--modules-to-save", "lm_head,up_proj"],
         dict(target_modules=["q_proj"], modules_to_save=["lm_head", "up_proj"])),
        (["--target-modules", "q_proj", "--layers-to-transform", "0,1"], dict(target_modules=["q_proj"])),
        (["--target-modules", "q_proj", "--layers-to-transform", "1"],
         dict(target_modules=["q_proj"], layers_to_transform=[1])),
    ],
)  # fmt: skip
def test_names_are_those_of_peft(run, place, words, given):
    code, said, err, _ = run(*ALONE, *words)
    assert code == 0, err
    assert int(re.search(r"Trained: ([\d,]+) of", said)[1].replace(",", "")) == trained_by_peft(place, **given)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--target-modules", "q_proj", "gate_porj"], "target_modules='gate_porj' is the name of no.*mean 'gate_proj'"),
        (["--target-modules", ".*q_porj"], r"target_modules='\.\*q_porj' is a regular expression .*'\.\*\\\.q_proj'"),
        (["--target-modules", "(q|v)_proj"], "is a regular expression that matches no module's whole name.*commas"),
        (["--exclude-modules", "zzz"], "exclude_modules='zzz' is the name of no module.*end in .*, q_proj"),
        (["--modules-to-save", "lm_haed"], "modules_to_save='lm_haed' is the name of no module.*mean 'lm_head'"),
        (["--layers-to-transform", "0,2"], "layers_to_transform=.0, 2.: .*in layers 2 of this model, .*layers 0 to 1"),
        (["--target-modules", "(q"], "is no regular expression"),
    ],
)  # fmt: skip
def test_names_of_nothing_are_refused_with_the_nearest(run, words, said):
    for dry in (("--dry-run",), ()):
        code, _, err, folder = run(*words, *dry)
        (line,) = [line for line in err.splitlines() if "error: " in line]
        assert code == 2 and re.search(said, line), line
        assert not folder.exists()


def test_texts_that_are_lists():
    assert as_names("a,b.c, d-e") == ["a", "b.c", "d-e"] and as_names(["a,b", "c"]) == ["a", "b", "c"]
    assert as_names("a,(b|c)") == "a,(b|c)" and as_names("all-linear") == "all-linear" and as_names(None) is None
    assert convert("eval_lengths", "4k,8192", list[int] | None) == [4096, 8192]
    with pytest.raises(ValueError, match="is not a list of int"):
        convert("eval_lengths", "4k,,8k", list[int] | None)
