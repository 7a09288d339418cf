"""An optimizer's state and the random generators' states as tensors and JSON, so that a checkpoint needs no pickle."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, nn.Parameter]]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state by parameter name into tensors and plain data.

    Returns `tensors` under `state/<parameter>/<key>` or `group/<index>/<key>`, and JSON-ready data with the param
    groups (their options; parameters by name) and each parameter's entries that are no tensors. Numbers come back
    exactly: JSON writes a float so that it reads back as the same one. ValueError for a parameter without a name.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    state: dict[str, dict[str, Any]] = {}
    for index, group in enumerate(optimizer.param_groups):
        members = []
        for parameter in group["params"]:
            if id(parameter) not in names:
                shape = tuple(parameter.shape)
                raise ValueError(f"optimizer: a parameter of group {index}, shape {shape}, has no name in the model")
            name = names[id(parameter)]
            members.append(name)
            if parameter in optimizer.state:
                state[name] = _split(optimizer.state[parameter], f"state/{name}", tensors)
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        groups.append({"params": members, "options": _split(options, f"group/{index}", tensors)})
    return tensors, {"groups": groups, "state": state}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
    json_state: dict[str, Any],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
) -> None:
    """Put back what `flatten_optimizer` took, bit for bit, each tensor on the device its optimizer keeps it on.

    How parameters are grouped may have changed (some trainers group by how they are spread over processes), as long as
    those of a group had the same options.
    Raises ValueError, before anything changes, when parameters differ, or those of a group had different options.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    saved = json_state["groups"]
    source = {name: index for index, kept in enumerate(saved) for name in kept["params"]}
    here = [[names.get(id(p), "(unnamed)") for p in group["params"]] for group in optimizer.param_groups]
    differing = sorted(source.keys() ^ {name for members in here for name in members})
    if differing:
        where = "checkpoint" if differing[0] in source else "model"
        raise ValueError(f"optimizer: parameter {differing[0]!r} is only in the {where}")
    groups, state, position = [], {}, 0
    for group, members in zip(optimizer.param_groups, here, strict=True):
        if not members:
            groups.append(group)
            continue
        first, *others = dict.fromkeys(source[name] for name in members)
        options = _join(saved[first]["options"], f"group/{first}", tensors)
        for other in others:
            _check_equal(options, _join(saved[other]["options"], f"group/{other}", tensors), members[0])
        positions = range(position, position + len(members))
        position += len(members)
        groups.append({**options, "params": list(positions)})
        for number, name in zip(positions, members, strict=True):
            if name in json_state["state"]:
                state[number] = _join(json_state["state"][name], f"state/{name}", tensors)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # load_state_dict casts to the parameter's dtype; what was saved in another one (fp32 moments of bf16) stays so.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            prefix = f"state/{names[id(parameter)]}/"
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.dtype != tensors[prefix + key].dtype:
                    optimizer.state[parameter][key] = tensors[prefix + key].to(value.device, copy=True)


def rng_tensors() -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's generators, and of this process's CUDA device if there is one."""
    import numpy

    version, words, gauss = random.getstate()
    legacy = numpy.random.get_state(legacy=False)
    tensors = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*legacy["state"]["key"].tolist(), legacy["state"]["pos"], legacy["has_gauss"]], dtype=torch.int64
        ),
        "numpy_gauss": torch.tensor([legacy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():  # only the current device: asking the others would start a context on each
        tensors["cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(tensors: dict[str, Tensor]) -> None:
    """Put back what `rng_tensors` returned. A CUDA state is skipped where there is no CUDA device."""
    import numpy

    version, *words = tensors["python"].tolist()
    gauss = tensors["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, position, has_gauss = tensors["numpy"].tolist()
    numpy.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": numpy.array(key, dtype=numpy.uint32), "pos": position},
            "has_gauss": has_gauss,
            "gauss": tensors["numpy_gauss"].item(),
        }
    )
    torch.set_rng_state(tensors["torch"].cpu())
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"].cpu())


def _check_equal(options: dict[str, Any], others: dict[str, Any], member: str) -> None:
    for name, value in options.items():
        other = others.get(name)
        same = torch.equal(value, other) if isinstance(value, Tensor) and isinstance(other, Tensor) else value == other
        if not same:
            raise ValueError(
                f"optimizer: {name} is {value} for {member!r} in the checkpoint, and {other} for others of its group"
            )


def _split(values: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Move the tensors of `values` to `tensors`; what stays is JSON, with a mark where a tensor or a tuple was."""
    plain: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Tensor):
            tensors[f"{prefix}/{key}"] = value
            plain[key] = {"tensor": True}
        elif isinstance(value, tuple):
            plain[key] = {"tuple": list(value)}
        elif value is None or isinstance(value, (bool, int, float, str, list)):
            plain[key] = value
        else:
            raise TypeError(f"optimizer: {prefix}/{key} is a {type(value).__name__}, expected a tensor or JSON")
    return plain


def _join(plain: dict[str, Any], prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The inverse of `_split`. Tensors are copied: the optimizer changes its own in place."""
    values: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            values[key] = tensors[f"{prefix}/{key}"].clone() if "tensor" in value else tuple(value["tuple"])
        else:
            values[key] = value
    return values
