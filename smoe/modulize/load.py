"""Loading what ``save_pretrained`` wrote, smoe's or Transformers': no pickles, no remote code.

Everything is checked before anything is changed: a damaged folder, or one of another model, is a ``ValueError`` of one
line, and the model that was passed stays as it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..control import check_whole, set_top_k
from ..router import FixedBuffers, check_top_k
from .build import architecture_of, base_of, build, float32_names, load_dense
from .convert import place
from .fit import Fit, fit_parts, fit_whole, listed
from .folder import CONFIG, OWN_CONFIG, Header, brief, read_headers, read_json, read_tensors, weight_files
from .hook import NO_RECORD, is_marked, is_transformers_model, is_wrong_weight
from .narrow import keep_experts, narrow_mlp
from .record import Record, plain_name, read_record
from .save import bare
from .swap import empty_layer


def from_pretrained(
    path: str | Path,
    *,
    model: nn.Module | None = None,
    top_k: int | Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """The model that :func:`smoe.save_pretrained` or Transformers' own wrote, in evaluation mode.

    Args:
        path: the folder.
        model: the model to load into, built the way it was before ``modulize``. It is changed in place and returned.
            None builds the Transformers model that the folder's config describes. A Transformers model of another
            class than the saved one (a classifier for a pretrained masked language model, an encoder-decoder whose
            halves are that model) gets every part that both have; a warning names what stays as ``model`` has it.
        top_k: k of every SMoE layer, or one k per layer; None leaves the k that was saved.
        dtype: of the weights, save those that a model keeps in float32 itself (T5). None leaves each weight as it was
            saved; in a model of another class, as ``model`` has it.
        device: of the model.

    Raises:
        ValueError: the folder holds no such model or is damaged, or ``model`` doesn't fit it. Nothing is changed then.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}; it must be a floating-point torch.dtype, or None")
    path = Path(path)
    own = (path / OWN_CONFIG).is_file()
    settings_file = path / (OWN_CONFIG if own else CONFIG)
    if not settings_file.is_file():
        raise ValueError(f"{str(path)!r} holds no {CONFIG}; it must be a folder that smoe.save_pretrained wrote")
    settings = read_json(settings_file)
    record = read_record(settings.get("smoe"), settings_file.name) or Record({}, {}, {})
    if record.is_empty and is_marked(settings):
        raise ValueError(NO_RECORD)
    files = weight_files(path)
    saved = {
        plain_name(name): header
        for name, header in read_headers(files).items()
        if not is_wrong_weight(plain_name(name), header.shape, record)
    }
    given = model is not None
    if not given:
        if own:
            raise ValueError(f"{str(path)!r} was saved from a model of your own; pass it, as it was built: model=...")
        if record.placed:
            raise ValueError(
                f"{str(path)!r} has SMoE layers that are no part of {architecture_of(settings)}, such as "
                f"{brief(next(iter(record.placed)))}; pass the model, as it was built: model=... (or save what "
                "smoe.modulize.adopt.adopt_layers makes of it)"
            )
        if not record.layers and not record.widths:
            return load_dense(path, settings, len(saved), dtype).to(device).eval()
        model = build(path, settings, saved, record)
    target = bare(model)
    check_whole(target, "from_pretrained")
    if given and not own and is_transformers_model(target) and type(target).__name__ != architecture_of(settings):
        fit = fit_parts(target, record, saved, base_of(settings))
    else:
        fit = fit_whole(target, record, saved)
    fit.check(saved, f"the weights in {str(path)!r}")
    for num_experts in fit.num_experts() if isinstance(top_k, int) else []:
        check_top_k(top_k, num_experts)
    target.to(device)
    if dtype is not None:
        _cast(target, dtype)
    _change(fit)
    if dtype is None and fit.whole:
        _take_dtypes(target, saved)
    _load(fit, files)
    if top_k is not None:
        set_top_k(target, top_k)
    if not fit.whole:
        warnings.warn(
            f"{type(target).__name__} keeps its own {listed(fit.missing()) or 'nothing'}, which {str(path)!r} has not; "
            f"unused there: {listed(fit.unused(saved)) or 'nothing'}",
            stacklevel=2,
        )
    return model.eval()


def _change(fit: Fit) -> None:
    """Does to the model what the record says; its weights don't matter yet."""
    for found, width in fit.narrowed:
        narrow_mlp(found, width)
    for layer, options in fit.placed:
        if options["num_experts"] < layer.num_experts:
            keep_experts(layer, torch.arange(options["num_experts"]))
        layer.output_scale, layer.router.score = options["output_scale"], options["score"]
        layer.top_k = options["top_k"]
    if fit.layers:
        place(fit.model, [(found, partial(empty_layer, found, options)) for found, options in fit.layers])


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the weights of ``model``, save those that Transformers keeps in float32 for this dtype."""
    keep = float32_names(model, dtype)
    for name, tensor in _castable(model):
        tensor.data = tensor.data.to(torch.float32 if keep(name) else dtype)


def _take_dtypes(model: nn.Module, saved: Mapping[str, Header]) -> None:
    """Gives every weight of ``model`` the dtype that it was saved with."""
    for name, tensor in _castable(model):
        header = saved.get(plain_name(name))
        if header is not None and header.dtype is not None:
            tensor.data = tensor.data.to(header.dtype)


def _castable(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what is saved and may be cast: a fixed router is float32 for good."""
    fixed = {id(b) for m in model.modules() if isinstance(m, FixedBuffers) for b in m.buffers(recurse=False)}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and id(tensor) not in fixed:
            yield name, tensor


def _load(fit: Fit, files: list[Path]) -> None:
    """Copies the tensors of ``files`` into the model, file after file."""
    real = {plain_name(name): name for name in fit.model.state_dict()}
    places: dict[str, list[str]] = {}
    for name, source in fit.sources.items():
        places.setdefault(source, []).append(real[name])
    for tensors in read_tensors(files):
        state = {name: value for key, value in tensors.items() for name in places.get(plain_name(key), ())}
        fit.model.load_state_dict(state, strict=False)
