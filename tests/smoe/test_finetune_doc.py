"""docs/finetune.md as it stands: its Python runs, and the models do what the page says."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers

import smoe

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs/finetune.md").read_text()
SIZES = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}


def _run(blocks: list[str], scope: dict) -> dict:
    for block in blocks:
        exec(compile(block, "docs/finetune.md", "exec"), scope)
    return scope


def _section(title: str) -> str:
    """The Python of a section that needs packages which the tests may lack."""
    (text,) = re.findall(rf"^## {title}$(.*?)(?=^## |\Z)", DOC, flags=re.S | re.M)
    (block,) = re.findall(r"```python notest\n(.*?)```", text, flags=re.S)
    return block


def _same(a, b, k):
    """The same logits, each at k, in evaluation."""
    ids = torch.arange(60, 80)[None]
    with torch.no_grad(), smoe.activated(a, k), smoe.activated(b, k):
        torch.testing.assert_close(a.eval()(ids).logits, b.eval()(ids).logits, rtol=0, atol=1e-5)


def test_its_python_runs_from_the_page_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    transformers.logging.set_verbosity_error()
    scope = _run(re.findall(r"```python\n(.*?)```", DOC, flags=re.S), {})
    losses, logs = scope["losses"], scope["trainer"].state.log_history
    assert losses[8] < losses[2] < losses[1] and losses[8] < logs[0]["loss"]
    assert [log["k"] for log in logs if "loss" in log] == [smoe.k_at(step, 20, 2, 8) for step in (9, 19)]
    assert all(0 < log["expert_entropy"] <= 1 for log in logs if "loss" in log)
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))  # what is in them: test_expert_load.py
    _same(scope["tuned"], scope["model"], 4)
    _same(scope["again"], scope["adapted"], 4)
    _same(scope["merged"], scope["adapted"], 4)
    _same(smoe.from_pretrained("merged"), scope["adapted"], 8)
    with pytest.raises(AssertionError):
        _same(scope["adapted"], scope["tuned"], 8)  # the adapters have learned something
    with scope["adapted"].disable_adapter():
        _same(scope["adapted"], scope["tuned"], 8)  # and nothing else has
    assert smoe.get_top_k(scope["plain"]) == smoe.k_at(19, 20, 4, 8)


def _base(folder: Path) -> Path:
    """An encoder with a tokenizer, whose tokens are bytes."""
    from examples import byte_tokenizer

    folder.mkdir()
    byte_tokenizer.save(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, pad_token="</s>")
    tokenizer.save_pretrained(folder)
    transformers.BertModel(transformers.BertConfig(vocab_size=260, **SIZES)).save_pretrained(folder)
    return folder


def test_lightning(monkeypatch, tmp_path):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    scope = _run([_section("Loops of your own")], {"smoe": smoe})
    seen = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.mlp = smoe.SMoE(8, 64, 8)

        def training_step(self, batch):
            seen.append(smoe.get_top_k(self))
            return self.mlp(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_steps=6, accelerator="cpu", callbacks=[scope["TopK"]()], logger=False, enable_checkpointing=False
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(12, 8), batch_size=2))
    assert seen == [smoe.k_at(step, 6, 4, 8) for step in range(6)] and len(set(seen)) > 2


def test_evaluation_harness(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from examples import byte_tokenizer

    monkeypatch.chdir(tmp_path)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", DOC, flags=re.S)
    (tmp_path / "sums.yaml").write_text(yaml)
    sums = [(a, b) for a in range(4) for b in range(3)]
    questions = [{"question": f"{a} and {b} is", "choices": [str(a + b), str(a + b + 1)], "answer": 0} for a, b in sums]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    byte_tokenizer.save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=260, **SIZES)).eval()
    smoe.modulize(model, 8, score="sum", seed=0)
    scope = {"smoe": smoe, "model": model, "tokenizer": tokenizer, "tasks": ["sums"]}
    scope["task_manager"] = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def chosen(question):
        """Which choice the model finds likelier, computed by hand."""
        likelihoods = []
        for choice in question["choices"]:
            ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (question["question"], f" {choice}")]
            with torch.no_grad():
                log_p = model(torch.tensor([ids[0] + ids[1]])).logits[0].log_softmax(-1)
            likelihoods.append(sum(log_p[len(ids[0]) - 1 + i, token].item() for i, token in enumerate(ids[1])))
        return likelihoods.index(max(likelihoods))

    _run([_section("lm-evaluation-harness")], scope)
    assert scope["results"]["sums"]["acc,none"] == sum(chosen(q) == 0 for q in questions) / len(questions)
    assert smoe.get_top_k(model) == 8


def test_sentence_encoders(tmp_path, monkeypatch):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    base = _base(tmp_path / "base")
    texts = ["a cat", "the dog sleeps"]
    dense = sentence_transformers.SentenceTransformer(str(base)).encode(texts)
    scope = _run([_section("Sentence encoders")], {"smoe": smoe})
    encoder = scope["encoder"]
    assert smoe.get_top_k(encoder) == 4 and abs(encoder.encode(texts) - dense).max() > 1e-3
    smoe.set_top_k(encoder, 8)
    assert abs(encoder.encode(texts) - dense).max() < 1e-5
