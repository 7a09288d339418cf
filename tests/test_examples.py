"""The programs in examples/ run, in seconds, and show what they say."""

import json
import sys

from examples import llama_bytes


def test_a_llama_learns_bytes_and_is_exported(data_dir, tmp_path, monkeypatch):
    sizes = ["--steps", "3", "--batch", "2", "--length", "32", "--eval_bytes", "512"]
    monkeypatch.setattr(sys, "argv", ["llama_bytes", "--data", str(data_dir), "--out", str(tmp_path), *sizes])
    llama_bytes.main()
    result = json.loads((tmp_path / "result.json").read_text())
    assert list(result["smoe"]) == ["1", "2", "4", "8", "16"]
    for k, bpc in result["smoe"].items():
        assert 7 < bpc < 8.1 and abs(bpc - result["exported"][k]) < 1e-5
        assert f"| {bpc:.4f} |" in (tmp_path / "hf" / "README.md").read_text()


def test_the_byte_tokenizer_gives_one_token_per_byte(tmp_path):
    from transformers import AutoTokenizer

    from examples import byte_tokenizer

    byte_tokenizer.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("hello  world", " == A ==\n* \u00e9 ", "\u4e2d"):
        ids = byte_tokenizer.encode(text.encode()).tolist()
        assert len(ids) == len(text.encode()) and max(ids) < byte_tokenizer.VOCAB_SIZE
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
        assert tokenizer.decode(ids) == text
