"""Groups of an optimizer while parameters come and go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from composer_gpt2.optimizer_groups import exchange_parameters, parameters_held


def build() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    groups = [
        {"params": parameters[:3], "weight_decay": 0.1},
        {"params": parameters[3:], "weight_decay": 0.0, "lr": 0.5},
    ]
    return parameters, torch.optim.AdamW(groups, lr=1e-3)


def test_a_new_parameter_has_the_group_and_the_place_of_the_old_one():
    (a, b, c, d), optimizer = build()
    new, other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(6))
    exchange_parameters([optimizer], {b: new, d: other})
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(a), id(new), id(c)]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(other)]
    assert optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.param_groups[1]["weight_decay"] == 0.0
    for parameter in (a, new, c, other):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(p, torch.ones_like(p)) for p in (a, new, c, other))
    assert torch.equal(b, torch.ones(2))


def test_a_removed_parameter_is_forgotten_with_its_state_and_its_empty_group_stays():
    parameters, optimizer = build()
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    gone = parameters[3]
    exchange_parameters([optimizer], {gone: None})
    assert gone not in optimizer.state
    assert len(optimizer.state) == 3
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 0]
    optimizer.step()  # an empty group is no error
    assert parameters_held([optimizer]) == set(parameters[:3])


def test_a_parameter_that_no_group_holds_stays_outside():
    _, optimizer = build()
    outside, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    exchange_parameters([optimizer], {outside: new})
    assert new not in parameters_held([optimizer])


def test_a_parameter_in_two_groups_is_an_error():
    (a, *_), optimizer = build()
    optimizer.param_groups[1]["params"].append(a)
    with pytest.raises(RuntimeError, match="in one group"):
        parameters_held([optimizer])
