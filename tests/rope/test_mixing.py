"""A class of ours in the class of one module: the object behaves otherwise, and copies, pickles and undoes well."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from peft_longlora.rope.mixing import Mixin, mix, mixed, unmix


class Doubled(Mixin):
    def forward(self, x):
        return 2 * super().forward(x)


class Negated(Mixin):
    def forward(self, x):
        return -super().forward(x)


class Own(nn.Linear):
    pass


@pytest.mark.parametrize("kind", [nn.Linear, Own])
def test_one_module_behaves_otherwise_and_no_other_does(kind):
    module, other, x = kind(4, 4), kind(4, 4), torch.randn(2, 4)
    before, parameters = module(x), list(module.parameters())
    mix(module, Doubled)
    assert torch.equal(module(x), 2 * before) and type(other) is kind and "forward" not in vars(module)
    assert isinstance(module, kind) and type(module).__name__ == kind.__name__ and type(module) is mixed(Doubled, kind)
    unmix(module)
    assert type(module) is kind and torch.equal(module(x), before)
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save])
@pytest.mark.parametrize("mixins", [[Doubled], [Doubled, Negated]], ids=["one", "two"])
def test_copies_and_pickles_have_the_class_and_a_state_of_their_own(again, mixins):
    module, x = nn.Linear(4, 4), torch.randn(2, 4)
    for mixin in mixins:
        mix(module, mixin)
    found = again(module)
    assert type(found) is type(module) and torch.equal(found(x), module(x))
    assert found.weight is not module.weight
    for _ in mixins:
        unmix(found)
    assert type(found) is nn.Linear and type(module) is not nn.Linear
