"""Building the Transformers model that a folder's config describes."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch
from torch import nn

from ..errors import one_line
from .folder import CONFIG, Header, brief, read_json
from .hook import forget
from .record import Record

# What sets how many layers or labels are built, one by one: too many would take forever, whatever their size.
_LAYERS = re.compile(r"(num_)?(hidden_|encoder_|decoder_)?(n_)?layers?|depths|block_sizes")
_MOST_LABELS, _MOST_LAYERS = 1_000_000, 10_000


def architecture_of(settings: Mapping[str, Any]) -> str:
    """The class that ``config.json`` names."""
    names = settings.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ValueError(f"{CONFIG}: architectures is {short(names)}; it must name the class of the model")
    return names[0]


def base_of(settings: Mapping[str, Any]) -> str:
    """What the class that ``config.json`` names calls its base model (``bert``)."""
    import transformers

    return getattr(getattr(transformers, architecture_of(settings), None), "base_model_prefix", "")


def build(path: Path, settings: Mapping[str, Any], saved: Mapping[str, Header], record: Record) -> nn.Module:
    """The dense model of the folder ``path``, with weights drawn at random.

    Constructor options that no config has (``add_pooling_layer``) are those that fit the names of the ``saved`` tensors
    best.

    Raises:
        ValueError: ``config.json`` describes no model of Transformers, or one whose sizes the tensors don't have.
    """
    import transformers

    model_class = _class_of(settings)
    _check_counts(settings, len(saved))
    with _OneLine(f"{CONFIG} describes no model that can be built"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        forget(config)
        shells = []
        for options in _constructor_options(model_class):
            with torch.device("meta"):
                shells.append((model_class(copy.deepcopy(config), **options), options))
    shell, options = min(shells, key=lambda pair: len(pair[0].state_dict().keys() ^ saved.keys()))
    _check_sizes(shell, saved, exact=not record.widths)
    with _OneLine(f"{CONFIG} describes no model that can be built"):
        model = model_class(config, **options)
        if (path / "generation_config.json").exists() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return model


def build_shell(path: Path) -> nn.Module:
    """The model that the config of the folder ``path`` describes, on the meta device; its weights need not be there.

    A config without ``architectures`` describes a base model. Raises ValueError, in one line, for any other class than
    a model of Transformers, and for sizes that nothing has.
    """
    import transformers

    settings = read_json(path / CONFIG)
    model_class = _class_of(settings) if settings.get("architectures") else transformers.AutoModel
    _check_counts(settings, _MOST_LAYERS)
    with _OneLine(f"{CONFIG} describes no model that can be built"), torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        auto = model_class is transformers.AutoModel
        return model_class.from_config(config, trust_remote_code=False) if auto else model_class(config)


def load_dense(path: Path, settings: Mapping[str, Any], num_tensors: int, dtype: torch.dtype | None) -> nn.Module:
    """The model of a folder without SMoE layers, with ``num_tensors`` weights, as Transformers itself loads it."""
    import transformers

    model_class = _class_of(settings)
    _check_counts(settings, num_tensors)
    name = "dtype" if hasattr(transformers.PretrainedConfig(), "dtype") else "torch_dtype"  # before 4.56
    tried = []
    for options in _constructor_options(model_class):
        with _OneLine(f"{str(path)!r} holds no model that Transformers can load"):
            model, report = model_class.from_pretrained(
                path,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **{name: "auto" if dtype is None else dtype},
                **options,
            )
        odd = {kind: sorted(map(str, report[f"{kind}_keys"])) for kind in ("missing", "unexpected", "mismatched")}
        if not any(odd.values()):
            return model
        tried.append("; ".join(f"{kind}: {', '.join(names[:3])}" for kind, names in odd.items() if names))
    raise ValueError(f"the weights in {str(path)!r} don't fit {model_class.__name__}: {tried[0]}")


def float32_names(model: nn.Module, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether a Transformers model keeps the parameter of a name in float32 when it is cast to ``dtype``."""
    patterns = []
    for prefix, module in model.named_modules():
        fields = ["_keep_in_fp32_modules"] if dtype == torch.float16 else []
        fields += ["_keep_in_fp32_modules_strict"] if dtype in (torch.float16, torch.bfloat16) else []
        for field in fields:
            for name in getattr(module, field, None) or ():
                inside = re.escape(name).replace(r"\*", r"[^.]*")
                patterns.append(re.compile(rf"{re.escape(prefix)}(.*\.)?\b{inside}(\.|$)"))
    return lambda name: any(pattern.match(name) for pattern in patterns)


def _class_of(settings: Mapping[str, Any]) -> type:
    import transformers

    name = architecture_of(settings)
    model_class = getattr(transformers, name, None) if name.isidentifier() else None
    if not inspect.isclass(model_class) or not issubclass(model_class, transformers.PreTrainedModel):
        raise ValueError(
            f"{CONFIG} names the architecture {brief(name)}, which transformers lacks; pass the model, as it was built:"
            " model=..."
        )
    return model_class


def _constructor_options(model_class: type) -> Iterator[dict[str, bool]]:
    """The switches of a class's constructor: first as they are by default, then every other way."""
    switches = {
        name: [parameter.default, not parameter.default]
        for name, parameter in inspect.signature(model_class.__init__).parameters.items()
        if isinstance(parameter.default, bool)
    }
    for values in itertools.islice(itertools.product(*switches.values()), 16):
        yield dict(zip(switches, values, strict=True))


def _check_counts(settings: Mapping[str, Any], num_tensors: int) -> None:
    """A ValueError if the config asks for far more layers than there are tensors, or for absurdly many labels."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _check_counts(value, num_tensors)
        most = _MOST_LABELS if name == "num_labels" else num_tensors + 100 if _LAYERS.fullmatch(name) else None
        for count in [] if most is None else value if isinstance(value, list) else [value]:
            if isinstance(count, (int, float)) and not count <= most:
                raise ValueError(
                    f"{CONFIG}: {name} is {short(value)}; with {num_tensors} tensors it must be at most {most}"
                )


def _check_sizes(shell: nn.Module, saved: Mapping[str, Header], exact: bool) -> None:
    """A ValueError if ``shell`` has far more parameters than the weights or (``exact``) a tensor of another shape."""
    for name, tensor in shell.state_dict().items():
        if exact and name in saved and tuple(tensor.shape) != saved[name].shape:
            raise ValueError(
                f"{CONFIG} describes a {type(shell).__name__} whose {name} has shape {tuple(tensor.shape)}, but the "
                f"weights hold {saved[name].shape}"
            )
    parameters = sum(p.numel() for p in shell.parameters())
    values = sum(torch.Size(header.shape).numel() for header in saved.values())
    if parameters > 1000 * values + 10**8:  # slimming alone makes the weights fewer than the config says
        raise ValueError(f"{CONFIG} describes a model of {parameters} parameters, but the weights hold {values}")


class _OneLine:
    """Turns whatever is raised inside into a ValueError of one line that begins with ``what``."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ImportError):
            raise ValueError(f"{self.what}: {type(error).__name__}: {one_line(error)[:500]}") from error
