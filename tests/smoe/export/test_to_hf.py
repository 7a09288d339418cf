"""Exported models compute what their source does, in a process that cannot import smoe; the rest is refused."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from tiny_models import LLAMA, build

import smoe
from smoe.export import to_hf

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Weights large enough that every part of the model shows in its logits.
SIZES = {**LLAMA, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SIZES |= {"max_position_embeddings": 128, "initializer_range": 0.3}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
AFTER, BEFORE = {"score": "softmax_after_topk"}, {"score": "softmax_before_topk"}
SOME = {"layers": [0, 2]}

# name -> (class, config, options of modulize, experts that slimming keeps)
CASES = {
    "llama": ("LlamaForCausalLM", {}, AFTER, None),
    "llama_tied_llama3": (
        "LlamaForCausalLM",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3},
        AFTER,
        None,
    ),
    "llama_wide_heads": ("LlamaForCausalLM", {"head_dim": 16, "hidden_act": "gelu"}, AFTER, None),
    "llama_slimmed": ("LlamaForCausalLM", {}, {**AFTER, "output_scale": "num_experts"}, 5),
    "llama_learned": ("LlamaForCausalLM", {}, {**AFTER, "router": "learned", "output_scale": 3}, None),
    "llama_classifier": ("LlamaForSequenceClassification", {"num_labels": 3}, AFTER, None),
    "mistral_window": ("MistralForCausalLM", {"sliding_window": 5}, {**AFTER, "output_scale": 8}, None),
    "mistral_tied": ("MistralForCausalLM", {"sliding_window": None, "tie_word_embeddings": True}, AFTER, None),
    "qwen3": ("Qwen3ForCausalLM", {"attention_bias": True}, BEFORE, None),
    "qwen3_tied_yarn": ("Qwen3ForCausalLM", {"tie_word_embeddings": True, "rope_parameters": YARN}, AFTER, None),
    "qwen3_some_dense": ("Qwen3ForCausalLM", {}, {**BEFORE, **SOME, "output_scale": "num_experts"}, None),
    "qwen3_some_dense_slimmed": ("Qwen3ForCausalLM", {}, {**AFTER, **SOME}, 3),
    "qwen3_window": (
        "Qwen3ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
        BEFORE,
        None,
    ),
}
PROMPT = torch.randint(3, 40, (2, 24), generator=torch.Generator().manual_seed(5))

WITHOUT_SMOE = """
import json, sys
sys.modules["smoe"] = None  # importing it fails
import torch, transformers
from safetensors.torch import load_file, save_file
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)
prompt, result = load_file("prompt.safetensors")["ids"], {}
for name, num_experts in json.load(open("cases.json")).items():
    auto = "AutoModelForSequenceClassification" if "classifier" in name else "AutoModelForCausalLM"
    for k in range(1, num_experts + 1):
        model, info = getattr(transformers, auto).from_pretrained(
            name, num_experts_per_tok=k, output_loading_info=True
        )
        assert not any(info.values()), (name, info)
        with torch.no_grad():
            result[f"{name} {k}"] = model(prompt).logits
            if k in (1, num_experts) and auto == "AutoModelForCausalLM":
                tokens = model.generate(prompt, max_new_tokens=64, do_sample=False, eos_token_id=None, use_cache=True)
                result[f"{name} {k} tokens"] = tokens
    result[f"{name} own k"] = torch.tensor(
        getattr(transformers, auto).from_pretrained(name).config.num_experts_per_tok
    )
save_file({key: value.contiguous() for key, value in result.items()}, "result.safetensors")
"""


def make(name):
    """The modulized model of a case, at k = 2."""
    model_class, settings, options, keep = CASES[name]
    model = smoe.modulize(build(model_class, {**SIZES, **settings}), 8, seed=3, **options)
    for _, layer in smoe.smoe_layers(model):
        layer.router.weight.data.normal_(0, 0.5)  # so that the experts' weights differ
    smoe.set_top_k(model, 2)
    if keep is not None:
        smoe.slim(model, smoe.vote(model, [{"input_ids": PROMPT}]), keep=keep)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with the exported models and what they computed without smoe."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exported")
    counts = {}
    for name in CASES:
        model = make(name)
        counts[name] = smoe.smoe_layers(model)[0][1].num_experts
        to_hf(model, folder / name)
    save_file({"ids": PROMPT}, folder / "prompt.safetensors")
    (folder / "cases.json").write_text(json.dumps(counts))
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_SMOE], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, load_file(folder / "result.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_logits_and_generation_are_the_same_without_smoe(name, exported):
    _, result = exported
    model = make(name)
    num_experts = smoe.smoe_layers(model)[0][1].num_experts
    different, before = 0, None
    for k in range(1, num_experts + 1):
        smoe.set_top_k(model, k)
        with torch.no_grad():
            logits = model(PROMPT).logits
        torch.testing.assert_close(result[f"{name} {k}"], logits, atol=1e-5, rtol=0)
        different += before is None or (logits - before).abs().max() > 1e-2
        before = logits
        if f"{name} {k} tokens" in result:
            tokens = model.generate(PROMPT, max_new_tokens=64, do_sample=False, eos_token_id=None, use_cache=True)
            assert tokens.shape == (2, 24 + 64) and torch.equal(result[f"{name} {k} tokens"], tokens)
    assert different == num_experts  # every k is another model
    assert result[f"{name} own k"] == 2
    assert "smoe" not in json.loads((exported[0] / name / "config.json").read_text())


def test_files_have_the_names_that_other_software_knows(exported):
    from safetensors import safe_open

    folder, _ = exported
    with safe_open(folder / "llama_tied_llama3" / "model.safetensors", "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert "model.layers.2.block_sparse_moe.experts.7.w2.weight" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names
    assert "lm_head.weight" not in names and metadata["format"] == "pt"
    with safe_open(folder / "qwen3_some_dense" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.layers.0.mlp.experts.7.down_proj.weight", "model.layers.1.mlp.down_proj.weight"} <= names
    config = json.loads((folder / "llama_tied_llama3" / "config.json").read_text())
    assert config["rope_theta"] == 5e4 and config["rope_scaling"]["factor"] == 8.0  # as before Transformers 5
    assert config["rope_parameters"]["rope_theta"] == 5e4
    assert json.loads((folder / "qwen3" / "config.json").read_text())["num_experts"] == 8


def test_the_source_is_left_as_it_was_and_an_earlier_export_goes(tmp_path):
    model = make("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_hf(model, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    to_hf(make("qwen3"), tmp_path, top_k=7)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["num_experts_per_tok"] == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("README.md", "config.json", "generation_config.json", "model.safetensors", "notes.txt")
    ]


def test_a_scale_by_k_is_right_at_that_k_alone_and_says_so(tmp_path):
    model = smoe.modulize(build("LlamaForCausalLM", SIZES), 8, seed=0, output_scale="k", top_k=3)
    with pytest.warns(UserWarning, match='output_scale is "k": the exported model is right at k = 3 alone'):
        to_hf(model, tmp_path / "3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        to_hf(model, tmp_path / "5", top_k=5)
    for k in (3, 5):
        native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(k))
        with smoe.activated(model, k), torch.no_grad():
            torch.testing.assert_close(native(PROMPT).logits, model(PROMPT).logits, atol=1e-5, rtol=0)
        card = (tmp_path / str(k) / "README.md").read_text()
        assert f"scaled for k = {k}: no other k is right" in card and card.count("\n| ") == 3
    assert smoe.get_top_k(model) == 3


def test_the_card_of_a_learned_router_counts_its_weights_once(tmp_path):
    to_hf(make("llama_learned"), tmp_path)
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    total = sum(p.numel() for p in native.parameters())
    card = (tmp_path / "README.md").read_text()
    assert f"| 8 | {total:,} |" in card and "AutoModelForCausalLM.from_pretrained" in card


def test_the_card_counts_what_one_token_uses(tmp_path):
    to_hf(make("qwen3_some_dense"), tmp_path, metrics={2: {"BPC": 1.5, "accuracy": 0.25}, 8: {"BPC": 1.25}})
    lines = (tmp_path / "README.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert rows[0] == ["k", "active parameters", "FLOPs", "BPC", "accuracy"] and len(rows) == 2 + 8
    assert rows[3][0] == "2" and rows[3][3:] == ["1.5000", "0.2500"] and rows[2][3:] == ["", ""]
    native = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    total = sum(p.numel() for p in native.parameters())
    assert rows[9][1] == f"{total:,}"
    one_expert = 3 * 16 * 8  # gate, up and down, d = 16, h = 8; in two layers
    assert rows[2][1] == f"{total - 2 * 7 * one_expert:,}"
    assert int(rows[3][2].replace(",", "")) - int(rows[2][2].replace(",", "")) == 2 * 2 * one_expert


def test_a_tokenizer_goes_along(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    )
    model = make("llama")
    to_hf(model, tmp_path / "given", tokenizer=tokenizer)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="tokenizer is .*empty', a folder without a tokenizer's files"):
        to_hf(model, tmp_path / "refused", tokenizer=tmp_path / "empty")
    assert not (tmp_path / "refused").exists()
    smoe.save_pretrained(model, tmp_path / "source")
    assert not (tmp_path / "source" / "tokenizer.json").exists()
    tokenizer.save_pretrained(tmp_path / "source")
    to_hf(smoe.from_pretrained(tmp_path / "source"), tmp_path / "known")
    to_hf(model, tmp_path / "folder", tokenizer=tmp_path / "source")
    for name in ("given", "known", "folder"):
        loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert loaded("b")["input_ids"] == [1], name


def test_bfloat16_keeps_its_dtype_and_the_routers_numbers(tmp_path):
    from safetensors.torch import load_file

    model = make("llama").to(torch.bfloat16)
    to_hf(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gate = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    assert gate.dtype == torch.float32 and torch.equal(gate, smoe.smoe_layers(model)[1][1].router.weight)
    assert tensors["model.layers.1.block_sparse_moe.experts.0.w1.weight"].dtype == torch.bfloat16
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def broken(name, **options):
    model = build(f"{name}ForCausalLM", {**SIZES, **options.pop("config", {})})
    return smoe.modulize(model, 8, **options)


def _biased():
    model = broken("Llama", router="learned")
    smoe.smoe_layers(model)[1][1].router.bias.data[2] = 0.1
    return model


def _uneven():
    model = make("llama")
    layers = dict(smoe.smoe_layers(model))
    from smoe.modulize.narrow import keep_experts

    keep_experts(next(iter(layers.values())), torch.arange(4))
    return model


def _two_ks():
    model = make("llama")
    smoe.set_top_k(model, [1, 2, 3])
    return model


def _resized():
    model = make("llama")
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(41, 16))
    return model


WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (
            lambda: broken("Llama", score="sum"),
            "has score='sum', which Mixtral lacks; it must be softmax_af",
        ),
        (lambda: broken("Llama", score="softmax_before_topk"), "layer 0 has score='softmax_before_topk'"),
        (lambda: broken("Qwen3", score="sum"), "it must be softmax_after_topk or softmax_before_topk"),
        (
            lambda: broken("Llama", router="uniform"),
            "layer 0 has a UniformRouter; Mixtral routes by a linear",
        ),
        (_biased, "layer 1 has a router with a bias; the router of Mixtral has none"),
        (lambda: broken("Llama", layers=[0, 2]), "layer 1 is dense; Mixtral has experts in every layer"),
        (lambda: broken("Llama", config={"mlp_bias": True}), "has experts with a bias|mlp_bias is True"),
        (
            lambda: broken("Llama", config={"attention_bias": True}),
            "config.attention_bias is True, which Mix",
        ),
        (
            lambda: broken("Qwen3", config=WINDOWS),
            "config.layer_types has both full_attention and sliding_att",
        ),
        (lambda: broken("Gemma"), "model is a GemmaForCausalLM; only Transformers' own Llama, Mistral, Qwen3 have a"),
        (lambda: build("LlamaForCausalLM", SIZES), "LlamaForCausalLM has no SMoE layer that smoe.modulize made"),
        (_uneven, "layers 0 and 1 have different numbers of experts, 4 and 8; one must do"),
        (_two_ks, r"the layers have different k, \[1, 2, 3\]; the exported model has one for all: give it as top_k"),
        (_resized, r"model.embed_tokens.weight has shape \(41, 16\), but \(40, 16\) in a LlamaForCausalLM"),
    ],
)
def test_what_no_target_computes_is_refused_in_one_line(make_model, message, tmp_path):
    with pytest.raises(ValueError, match=message) as refused:
        to_hf(make_model(), tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_a_k_that_the_model_lacks_and_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="top_k is 9; it must be a whole number from 1 to num_experts = 8"):
        to_hf(make("llama"), tmp_path / "out", top_k=9)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="which is a file; it must be a folder"):
        to_hf(make("llama"), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
