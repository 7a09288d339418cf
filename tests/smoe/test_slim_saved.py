"""``smoe slim``: a saved Hugging Face model with fewer experts; a run goes to the program that it is of."""

import sys

import pytest
import tokenizers
import torch
import transformers

import smoe
from smoe import cli

WORDS = ["[PAD]", "[UNK]", "a", "b", "c", "d", "e", "f"]
TEXTS = ["a b c d e f", "b", "", "c c d", "f e d c b a a b c d e f", "e"]


@pytest.fixture
def folder(tmp_path):
    """A modulized BERT and its tokenizer."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=8,
    )  # fmt: skip
    model = smoe.modulize(transformers.BertForMaskedLM(config), num_experts=8, seed=1, output_scale="num_experts")
    smoe.save_pretrained(model, tmp_path / "model")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "model")
    (tmp_path / "texts").write_text("\n".join(TEXTS))
    return tmp_path


def argv(folder, *flags, model="model", out="out"):
    words = ["slim", "--model", folder / model, "--data", folder / "texts", "--out", folder / out, *flags]
    return [str(word) for word in words]


@pytest.mark.parametrize("score", ["count", "weight", "reap"])
def test_the_experts_that_the_texts_vote_for_stay(score, folder, capsys):
    assert cli.main(argv(folder, "--keep", 3, "--score", score)) == 0
    assert capsys.readouterr().out.startswith("3 of 8 experts per layer")
    expected = smoe.from_pretrained(folder / "model", top_k=3)
    ids = [torch.tensor([[WORDS.index(word) for word in text.split()][:8]]) for text in TEXTS if text]
    smoe.slim(expected, smoe.vote(expected, [{"input_ids": row} for row in ids], score=score), keep=3)
    slimmed = smoe.from_pretrained(folder / "out")
    torch.testing.assert_close(slimmed(ids[0]).logits, expected(ids[0]).logits)
    assert smoe.get_top_k(slimmed) == 3
    sizes = [(folder / name / "model.safetensors").stat().st_size for name in ("model", "out")]
    assert sizes[1] < sizes[0]
    assert transformers.AutoTokenizer.from_pretrained(folder / "out")("a b")["input_ids"] == [2, 3]


def test_to_keep_all_is_the_identity(folder):
    assert cli.main(argv(folder, "--keep", 8)) == 0
    before, after = (smoe.from_pretrained(folder / name).state_dict() for name in ("model", "out"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--keep", 9], "--keep is 9; it must be from 1 to 8"),
        (["--keep", 0], "--keep is 0"),
        (["--keep", 3, "--k", 8], "--k is 8, at which all experts of a layer have the same count"),
        (["--keep", 3, "--checkpoint", "last"], "--checkpoint has no effect with --model"),
        (["--keep", 3, "--data", "/nowhere"], "/nowhere"),
        (["--keep", 3, "--out", "."], "out: . is there already"),
        (["--keep", 3, "--run", "x"], "not allowed"),
        ([], "--keep"),
    ],
)
def test_bad_options_are_one_line(flags, message, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv(folder, *flags))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {"model", "texts"}


def test_models_that_cannot_be_slimmed_are_one_line(folder, capsys):
    dense = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=16, num_attention_heads=2))
    dense.save_pretrained(folder / "dense")
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer_config.json").unlink()
    capsys.readouterr()
    for model, message in (("dense", "no SMoE layers"), ("model", "no tokenizer"), ("nothing", "nothing")):
        with pytest.raises(SystemExit) as stop:
            cli.main(argv(folder, "--keep", "3", model=model))
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error and error.count("\n") == 1, error
    (folder / "texts").write_text("\n \n")
    with pytest.raises(SystemExit):
        cli.main(argv(folder, "--keep", "3"))
    assert "has no text" in capsys.readouterr().err and not (folder / "out").exists()


@pytest.mark.parametrize(("config", "package"), [("model: bert\n", "bert"), ("d_head: 4\n", "transformer_xl")])
def test_a_run_goes_to_its_program(config, package, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config)
    (tmp_path / "smoe").mkdir()
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "smoe" / "cli.py"))
    monkeypatch.setattr(sys, "argv", ["smoe"])
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    command = ["slim", "--run", run, "--keep", "3", "--out", out, "--score", "reap"]
    with pytest.raises(SystemExit) as stop:
        cli.main(command)
    assert stop.value.code == 2
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").touch()
    (tmp_path / package / "slim.py").write_text("import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    monkeypatch.chdir(tmp_path)
    assert cli.main(command) == 7


def test_a_run_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["slim", "--run", str(tmp_path), "--keep", "3", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "not a run folder" in capsys.readouterr().err
