"""How fixtures/reference.safetensors was made: a tiny model of the published Transformer-XL, run on three segments.

    git clone https://github.com/kimiyoung/transformer-xl
    python tests/transformer_xl/make_reference_fixture.py --reference transformer-xl

Holds the reference's state dict under `weights.`, and for each segment s `input.s` and `target.s` (B, T) and the
outputs `nll.s` (B, T) in nats, `log_probs.s` (B, T, V) and `memory.s` (L, B, M, d), all turned to batch first. The
memory length, 6, is longer than one segment, 5, so that the memory is empty, partly full and full.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.transformer_xl_reference import build_reference, run_reference

SIZES = dict(vocab_size=20, num_layers=2, d_model=16, num_heads=2, d_head=8, d_hidden=32)
BATCH, LENGTH, MEMORY_LENGTH, SEGMENTS = 3, 5, 6, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--reference", required=True, help="checkout of kimiyoung/transformer-xl")
    parser.add_argument("--output", default=Path(__file__).parent / "fixtures" / "reference.safetensors", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    model = build_reference(options.reference, **SIZES, dropout=0.0, length=LENGTH, memory_length=MEMORY_LENGTH)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.3)  # large enough for every part to matter
    model.eval()

    tensors = {f"weights.{name}": value.clone() for name, value in model.state_dict().items()}
    memories: tuple[torch.Tensor, ...] = ()
    hidden: list[torch.Tensor] = []  # what the output layer sees, to get at all log-probabilities and not one per token
    model.crit.register_forward_pre_hook(lambda module, arguments: hidden.append(arguments[0]))
    for segment in range(SEGMENTS):
        ids, targets = torch.randint(0, SIZES["vocab_size"], (2, BATCH, LENGTH))
        with torch.no_grad():
            nll, *memories = run_reference(model, ids.T.contiguous(), targets.T.contiguous(), *memories)
            logits = hidden[-1] @ model.crit.out_layers[0].weight.T + model.crit.out_layers[0].bias
        tensors |= {
            f"input.{segment}": ids.clone(),
            f"target.{segment}": targets.clone(),
            f"nll.{segment}": nll.T.contiguous(),
            f"log_probs.{segment}": logits.log_softmax(-1).view(LENGTH, BATCH, -1).transpose(0, 1).contiguous(),
            # The last entry is the output of the last layer, which no layer reads.
            f"memory.{segment}": torch.stack(memories[:-1]).transpose(1, 2).contiguous(),
        }
    options.output.parent.mkdir(exist_ok=True)
    save_file(tensors, options.output)


if __name__ == "__main__":
    main()
