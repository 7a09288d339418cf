"""Load weights of other Transformer-XL implementations: the published reference one and the paper's release.

`python -m transformer_xl.convert IN.pt OUT.safetensors` converts a file of torch.save: a state dict or a whole pickled
model, of which only the tensors are read and nothing is run (`transformer_xl.unpickle`). The output's metadata holds
the configuration as JSON under `config`.
"""

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from transformer_xl.model import TransformerXLConfig
from transformer_xl.unpickle import load_tensors

# Computed from the sizes, or (crit.out_layers.0.weight) tied to the embedding: not needed, but fine to have.
_DERIVED = {"pos_emb.inv_freq"}

_TOP = {
    "word_emb.emb_layers.0.weight": "embedding.weight",
    "r_w_bias": "content_bias",
    "r_r_bias": "position_bias",
    "crit.out_layers.0.bias": "output_bias",
}
_LAYER = {
    "dec_attn.r_net.weight": "attention.position.weight",
    "dec_attn.o_net.weight": "attention.output.weight",
    "dec_attn.layer_norm.weight": "attention_norm.weight",
    "dec_attn.layer_norm.bias": "attention_norm.bias",
    "pos_ff.layer_norm.weight": "mlp_norm.weight",
    "pos_ff.layer_norm.bias": "mlp_norm.bias",
}
_QKV = "dec_attn.qkv_net.weight"
_DENSE = {
    "pos_ff.CoreNet.0.weight": "mlp.up.weight",
    "pos_ff.CoreNet.0.bias": "mlp.up.bias",
    "pos_ff.CoreNet.3.weight": "mlp.down.weight",
    "pos_ff.CoreNet.3.bias": "mlp.down.bias",
}
_EXPERTS = {
    "pos_ff.gate.gate.weight": "mlp.router.weight",
    "pos_ff.gate.gate.bias": "mlp.router.bias",
    "pos_ff.experts.htoh4.weight": "mlp.experts.up",
    "pos_ff.experts.htoh4.bias": "mlp.experts.up_bias",
    "pos_ff.experts.h4toh.weight": "mlp.experts.down",
    "pos_ff.experts.h4toh.bias": "mlp.experts.down_bias",
}


def from_reference(state_dict: Mapping[str, Tensor]) -> tuple[TransformerXLConfig, dict[str, Tensor]]:
    """Convert the state dict of kimiyoung/transformer-xl's PyTorch `MemTransformerLM`.

    Supports what the enwik8 and text8 scripts train: `attn_type` 0, post-norm, tied weights, no adaptive softmax.
    Returns the configuration, with sizes read off the tensors and everything else (dropout rates) at its default, and
    a state dict that `TransformerXL(config).load_state_dict` takes. Tensors may share memory with the input.
    Raises ValueError naming the keys that are missing, unknown or of a wrong shape.
    """
    return _convert(state_dict, allow_experts=False)


def from_release(state_dict: Mapping[str, Tensor]) -> tuple[TransformerXLConfig, dict[str, Tensor]]:
    """Convert the state dict of the paper's release (VITA-Group/Random-MoE-as-Dropout), dense, SMoE or mixed layers.

    MLPs made of experts become the layout of `smoe.SMoE`: `mlp.router.weight (N, d)`, `mlp.experts.up (N, h, d)`
    and so on; dense ones stay dense. `config.d_hidden` is N x h. The rest is as in `from_reference`.
    """
    return _convert(state_dict, allow_experts=True)


def _convert(source: Mapping[str, Tensor], allow_experts: bool) -> tuple[TransformerXLConfig, dict[str, Tensor]]:
    # Models wrapped for data parallelism put "module." before every key.
    source = {key.removeprefix("module."): value for key, value in source.items()}
    layer_numbers = {int(match[1]) for key in source if (match := re.match(r"layers\.(\d{1,9})\.", key))}
    num_layers = min(max(layer_numbers, default=-1) + 1, len(source))  # no more than there can be, whatever a key says
    has_experts = [allow_experts and f"layers.{i}.pos_ff.gate.gate.weight" in source for i in range(num_layers)]

    names = dict(_TOP)  # source key -> our key
    for i in range(num_layers):
        mlp = _EXPERTS if has_experts[i] else _DENSE
        names |= {f"layers.{i}.{theirs}": f"layers.{i}.{ours}" for theirs, ours in (_LAYER | mlp).items()}
    qkv_keys = [f"layers.{i}.{_QKV}" for i in range(num_layers)]
    tied = "crit.out_layers.0.weight"
    _check_keys(source, needed={*names, *qkv_keys}, optional=_DERIVED | {tied}, num_layers=num_layers)

    embedding = source["word_emb.emb_layers.0.weight"]
    _check_shape(source, "word_emb.emb_layers.0.weight", (None, None))
    _check_shape(source, "r_w_bias", (None, None))
    if tied in source and not torch.equal(source[tied], embedding):
        raise ValueError(f"{tied} differs from word_emb.emb_layers.0.weight, but this model ties the two weights")

    # Where only some layers have experts, the others may be narrower than all experts together.
    sized_by = has_experts.index(True) if any(has_experts) else 0
    up = "experts.htoh4.weight" if has_experts[sized_by] else "CoreNet.0.weight"
    _check_shape(source, f"layers.{sized_by}.pos_ff.{up}", (None,) * (3 if has_experts[sized_by] else 2))
    config = TransformerXLConfig(
        vocab_size=embedding.shape[0],
        num_layers=num_layers,
        d_model=embedding.shape[1],
        num_heads=source["r_w_bias"].shape[0],
        d_head=source["r_w_bias"].shape[1],
        d_hidden=source[f"layers.{sized_by}.pos_ff.{up}"].shape[:-1].numel(),
    )
    _check_shapes(source, config, has_experts)

    converted = {ours: source[theirs] for theirs, ours in names.items()}
    for i, key in enumerate(qkv_keys):
        inner = config.num_heads * config.d_head
        query, key_value = source[key].split([inner, 2 * inner])
        converted[f"layers.{i}.attention.query.weight"] = query
        converted[f"layers.{i}.attention.key_value.weight"] = key_value
        down = f"layers.{i}.mlp.experts.down"
        if down in converted:  # theirs is (N, d, h), ours (N, h, d)
            converted[down] = converted[down].transpose(1, 2)
    return config, {key: value.contiguous() for key, value in converted.items()}


def _check_keys(source: Mapping[str, Tensor], needed: set[str], optional: set[str], num_layers: int) -> None:
    missing, unknown = sorted(needed - source.keys()), sorted(source.keys() - needed - optional)
    if num_layers == 0:
        missing.append("layers.0.*")
    problems = [f"{what} {_listed(keys)}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys]
    if problems:
        raise ValueError(f"These are not the weights of a Transformer-XL that can be converted: {'; '.join(problems)}")


def _listed(keys: list[str], most: int = 20) -> str:
    """Keys of a file for a message: the first of them, long and odd ones as Python writes text."""
    shown = [key if len(key) <= 100 and key.isprintable() else repr(key[:100]) for key in keys[:most]]
    return ", ".join([*shown, f"{len(keys) - most} more"] if len(keys) > most else shown)


def _check_shapes(source: Mapping[str, Tensor], config: TransformerXLConfig, has_experts: list[bool]) -> None:
    """Every tensor must fit the sizes in `config`; the number of experts is free for each layer."""
    vocab, d, inner, hidden = config.vocab_size, config.d_model, config.num_heads * config.d_head, config.d_hidden
    _check_shape(source, "r_r_bias", (config.num_heads, config.d_head))
    _check_shape(source, "crit.out_layers.0.bias", (vocab,))
    for i in range(config.num_layers):
        shapes = {_QKV: (3 * inner, d), "dec_attn.r_net.weight": (inner, d), "dec_attn.o_net.weight": (d, inner)}
        shapes |= {key: (d,) for key in _LAYER if "layer_norm" in key}
        if has_experts[i]:
            _check_shape(source, f"layers.{i}.pos_ff.gate.gate.weight", (None, d))
            experts = source[f"layers.{i}.pos_ff.gate.gate.weight"].shape[0]
            if not experts:
                raise ValueError(f"layers.{i}.pos_ff.gate.gate.weight has no expert, but must have at least 1")
            shapes |= {
                "pos_ff.gate.gate.weight": (experts, d),
                "pos_ff.gate.gate.bias": (experts,),
                "pos_ff.experts.htoh4.weight": (experts, hidden // experts, d),
                "pos_ff.experts.htoh4.bias": (experts, hidden // experts),
                "pos_ff.experts.h4toh.weight": (experts, d, hidden // experts),
                "pos_ff.experts.h4toh.bias": (experts, d),
            }
        else:
            _check_shape(source, f"layers.{i}.pos_ff.CoreNet.0.weight", (None, d))
            width = source[f"layers.{i}.pos_ff.CoreNet.0.weight"].shape[0] if any(has_experts) else hidden
            shapes |= {
                "pos_ff.CoreNet.0.weight": (width, d),
                "pos_ff.CoreNet.0.bias": (width,),
                "pos_ff.CoreNet.3.weight": (d, width),
                "pos_ff.CoreNet.3.bias": (d,),
            }
        for key, shape in shapes.items():
            _check_shape(source, f"layers.{i}.{key}", shape)


def _check_shape(source: Mapping[str, Tensor], key: str, expected: tuple[int | None, ...]) -> None:
    actual = tuple(source[key].shape)
    if len(actual) != len(expected) or any(e not in (None, a) for a, e in zip(actual, expected, strict=True)):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{key} has shape {actual}, but must be ({wanted})")


def main(arguments: list[str] | None = None) -> int:
    """Command line: convert IN.pt, a checkpoint of either source, to OUT.safetensors. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m transformer_xl.convert", description=__doc__.split("\n\n")[0])
    parser.add_argument("input", metavar="IN.pt", help="a file of torch.save, of the reference or the release")
    parser.add_argument("output", metavar="OUT.safetensors", help="file to write")
    options = parser.parse_args(arguments)

    from safetensors.torch import save_file

    try:
        if not Path(options.output).absolute().parent.is_dir():
            raise ValueError(f"{options.output} can't be written: its folder doesn't exist")
        config, state = from_release(load_tensors(options.input))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    save_file(state, options.output, metadata={"config": json.dumps(dataclasses.asdict(config))})
    print(f"{options.output}: {sum(value.numel() for value in state.values()):,} parameters, {config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
