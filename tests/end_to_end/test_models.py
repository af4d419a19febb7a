"""Models of transformers, tiny and random: patched, trained with ranks that move, exported, unpatched."""

import copy
import warnings

import pytest
import torch
import transformers as hf
from helpers import SIZES, assert_untouched, same_bits, snapshot, tokens, trainable
from peft_helpers import loaded
from torch import nn

import l1ra
from l1ra.layers.adapted_model import controller_of

WIDE = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GROUPED = {**WIDE, **IDS, "num_key_value_heads": 2}
HEADS_OF_8 = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
VISION = {k: WIDE[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
VISION |= {"image_size": 8, "patch_size": 4}
TWO_STACKS = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))}
TWO_STACKS |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 2, **IDS}
T5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **IDS}


def lm(name, config=None, **settings):
    return lambda: getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{config or name}Config")(**settings))


def whisper():
    sizes = {"vocab_size": 50, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **TWO_STACKS))


def llava():
    vision, text = hf.CLIPVisionConfig(**VISION), hf.LlamaConfig(**GROUPED)
    # The last layer's features, not the last but one's: so that every adapter is used.
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=49, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


MODELS = {
    "Llama": lm("Llama", **GROUPED),
    "Llama, tied": lm("Llama", **GROUPED, tie_word_embeddings=True),
    "Mistral": lm("Mistral", **GROUPED),
    "Qwen3": lm("Qwen3", **HEADS_OF_8),
    "Gemma3": lm("Gemma3", "Gemma3Text", **HEADS_OF_8),
    "Falcon": lm("Falcon", **WIDE),  # whose layers are a subclass of nn.Linear with a forward of its own
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
    "Mixtral": lm("Mixtral", **GROUPED, **EXPERTS),
    "Qwen2-MoE": lm("Qwen2Moe", **GROUPED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "GPT-OSS": lm("GptOss", **HEADS_OF_8, **EXPERTS),
    "Llama4": lm("Llama4", "Llama4Text", **HEADS_OF_8, **EXPERTS, intermediate_size_mlp=48),
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**WIDE)),
    "DistilBERT": lambda: hf.DistilBertForSequenceClassification(
        hf.DistilBertConfig(vocab_size=50, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=32)
    ),
    "T5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)),
    "BART": lambda: hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=50, d_model=32, **TWO_STACKS)),
    "Whisper": whisper,
    "ViT": lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION, num_labels=3)),
    "LLaVA": llava,
}
MIXTURES = {"Mixtral", "Qwen2-MoE", "GPT-OSS", "Llama4"}
SHORT = {"total_steps": 10, "interval": 2, "warmup": 0.0, "cooldown": 0.2, "margin": 1.0}


def batch(model):
    generator = torch.Generator().manual_seed(2)
    ids, pixels = tokens().clamp(3, 48), torch.randn(2, 3, 8, 8, generator=generator)
    if isinstance(model, hf.WhisperForConditionalGeneration):
        return {"input_features": torch.randn(2, 8, 20, generator=generator), "labels": ids}
    if isinstance(model, hf.ViTForImageClassification):
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    if isinstance(model, hf.LlavaForConditionalGeneration):
        image = torch.full((2, 4), 49)
        labels = torch.cat([torch.full_like(image, -100), ids], 1)
        return {"input_ids": torch.cat([image, ids], 1), "labels": labels, "pixel_values": pixels}
    is_classifier = type(model).__name__.endswith("ForSequenceClassification")
    return {"input_ids": ids, "labels": torch.tensor([0, 1]) if is_classifier else ids}


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


def trained(model, inputs, steps=6):
    """``model`` after some steps, and the names of the adapters that a gradient did not reach at one of them."""
    optimizer, missed = torch.optim.AdamW(trainable(model), lr=1e-2), set()
    adapters = controller_of(model).adapters
    for step in range(steps):
        loss = model.train()(**inputs).loss
        assert loss.isfinite()
        loss.backward()
        for name, layer in adapters.items():
            # At first B is 0, and so is the gradient of all else.
            parts = (layer.lora_A, layer.gate, layer.lora_B) if step else (layer.lora_B,)
            if any(part.grad is None or not part.grad.any() for part in parts):
                missed.add(name)
        optimizer.step()
        optimizer.zero_grad()
    return missed


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_patched_trained_exported_and_given_back(name, tmp_path):
    model = MODELS[name]().eval()
    base, inputs = copy.deepcopy(model), batch(model)
    plain = logits(model, inputs)
    before = snapshot(model)  # some models hook their own layers in the first forward
    layers = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in model.modules())

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        controller = l1ra.patch(model, 2 * layers, **SHORT)
    assert any("stacked experts" in str(warning.message) for warning in said) == (name in MIXTURES)
    assert same_bits(logits(model, inputs), plain)

    assert trained(model, inputs) == set()
    assert controller.moved > 0 and sum(controller.ranks.values()) <= 2 * layers
    learned = logits(model, inputs)
    assert (learned - plain).abs().max() > 0.01
    assert len(l1ra.report(model).rows) == len(controller.ranks) and str(l1ra.report(model))

    l1ra.export_peft(model, tmp_path)
    torch.testing.assert_close(logits(loaded(copy.deepcopy(base), tmp_path), inputs), learned, rtol=0, atol=1e-5)

    l1ra.unpatch(model)
    with torch.no_grad():  # what was trained in full stays so
        for head in (n for n, m in base.named_children() if "classifier" in n):
            model.get_submodule(head).load_state_dict(base.get_submodule(head).state_dict())
    assert_untouched(model.eval(), before)
    assert same_bits(logits(model, inputs), plain)


@pytest.mark.parametrize(
    "name, embedding",
    [("Llama", "embed_tokens"), ("Llama, tied", "embed_tokens"), ("Gemma3", "embed_tokens"), ("T5", "shared")],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings:UserWarning")
def test_embeddings_are_trained_in_full_tied_or_not(name, embedding, tmp_path):
    model = MODELS[name]()
    base, inputs = copy.deepcopy(model), batch(model)
    l1ra.patch(model, 80, modules_to_save=[embedding], **SHORT)
    trained(model, inputs)
    old, new = (m.get_input_embeddings().weight for m in (base, model))
    assert not torch.equal(old, new)
    tied = base.config.tie_word_embeddings
    assert (model.get_output_embeddings().weight is new) == tied
    l1ra.export_peft(model, tmp_path)
    read = loaded(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(logits(read, inputs), logits(model, inputs), rtol=0, atol=1e-5)
    l1ra.from_peft(base, tmp_path)
    torch.testing.assert_close(logits(base, inputs), logits(model, inputs), rtol=0, atol=1e-5)
    assert (base.get_output_embeddings().weight is base.get_input_embeddings().weight) == tied


def test_stacked_experts_are_trained_in_full_if_asked_for(tmp_path):
    model = MODELS["Mixtral"]()
    base, inputs = copy.deepcopy(model), batch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        l1ra.patch(model, 80, modules_to_save=["experts"], **SHORT)
    trained(model, inputs)
    assert not torch.equal(*(m.model.layers[0].mlp.experts.down_proj for m in (base, model)))
    l1ra.export_peft(model, tmp_path)
    read = loaded(base, tmp_path)
    torch.testing.assert_close(logits(read, inputs), logits(model, inputs), rtol=0, atol=1e-5)


def test_an_untied_head_is_adapted_merged_and_saved(tmp_path):
    model = MODELS["Llama, tied"]()
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens.*Untie it first"):
        l1ra.patch(model, 4, target_modules=["lm_head"])
    # As the message says.
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    base, inputs = copy.deepcopy(model), batch(model)
    l1ra.patch(model, 4, target_modules=["lm_head"], **SHORT)
    assert trained(model, inputs) == set()
    learned = logits(model, inputs)
    l1ra.export_peft(model, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded(base, tmp_path / "lora"), inputs), learned, rtol=0, atol=1e-5)
    embeddings = model.model.embed_tokens.weight.clone()
    model.lm_head.merge()
    assert torch.equal(model.model.embed_tokens.weight, embeddings)
    merged = model.lm_head.base_layer.weight.clone()
    l1ra.unpatch(model)
    model.lm_head.weight.data.copy_(merged)
    model.save_pretrained(tmp_path / "whole")
    whole = type(model).from_pretrained(tmp_path / "whole")
    torch.testing.assert_close(logits(whole, inputs), learned, rtol=0, atol=1e-5)


def test_t5_reads_the_dtype_of_an_adapted_layer_that_is_kept_in_float32(tmp_path):
    MODELS["T5"]().save_pretrained(tmp_path)
    model = hf.T5ForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float16)
    feed_forward = model.encoder.block[0].layer[1].DenseReluDense
    assert feed_forward.wo.weight.dtype == torch.float32 and feed_forward.wi.weight.dtype == torch.float16
    inputs = batch(model)
    plain = logits(model, inputs)
    l1ra.patch(model, 64, **SHORT)
    assert same_bits(logits(model, inputs), plain)
    assert trained(model, inputs, steps=2) == set()
