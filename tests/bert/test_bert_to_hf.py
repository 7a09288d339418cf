"""A pretrained run as a Hugging Face folder: the same numbers, another head, the tokenizer."""

import pytest
import torch
from runs import assert_one_line
from transformers import AutoTokenizer, BertForSequenceClassification

import smoe
from bert.evaluate import load_run


@pytest.mark.parametrize(
    ("model", "method"), [("bert", "smoe_dropout"), ("roberta", "smoe"), ("bert", "dense_dropout")]
)
def test_the_folder_holds_the_model_of_the_run(model, method, pretrain, start, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    assert pretrain(model, method, run, "--steps", 2).wait() == 0
    command = start("bert.to_hf", run, "--out", out)
    assert command.wait() == 0, command.err
    loaded, (config, source, checkpoint) = smoe.from_pretrained(out).eval(), load_run(run)
    if method != "dense_dropout":
        assert smoe.get_top_k(loaded) == config.eval_ks()[0]
        smoe.set_top_k(source, config.eval_ks()[0])
    ids = torch.randint(6, 200, (2, 32))
    torch.testing.assert_close(loaded(ids).logits, source(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.mask_token_id == checkpoint.state["facts"]["vocabulary"]["mask"]
    assert tokenizer.model_max_length == config.seq_len
    assert_one_line(start("bert.to_hf", run, "--out", out), 2, "hf", "is there already")


def test_another_head_starts_from_it(pretrain, start, tmp_path):
    run, out = tmp_path / "run", tmp_path / "hf"
    assert pretrain("bert", "smoe_dropout", run, "--steps", 2).wait() == 0
    assert start("bert.to_hf", run, "--out", out).wait() == 0
    _, source, _ = load_run(run)
    classifier = smoe.from_pretrained(out, model=BertForSequenceClassification(source.config))
    assert len(smoe.smoe_layers(classifier)) == 2
    pretrained = source.bert.embeddings.word_embeddings.weight
    assert torch.equal(classifier.bert.embeddings.word_embeddings.weight, pretrained)
