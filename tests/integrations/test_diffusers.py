"""diffusers, unmodified: models and pipelines load as what was trained, and LoRAs in its own files."""

import inspect
import os

import pytest
import torch
from helpers import shake
from safetensors.torch import load_file
from trainer_helpers import livelier

import l1ra
from l1ra.files.peft_export import DIFFUSERS_WEIGHTS
from l1ra.layers.adapted_model import find_adapters

diffusers = pytest.importorskip("diffusers")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def unet():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    return model.eval()


def text_encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return livelier(CLIPTextModel(CLIPTextConfig(vocab_size=50, max_position_embeddings=16, **sizes)))


def denoised(model):
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([3, 40]), text).sample


def patched():
    model = unet()
    l1ra.patch(model, 64, target_modules=ATTENTION)
    for i, (_, layer) in enumerate(find_adapters(shake(model, 1.0))):
        with torch.no_grad():
            layer.gate[i % 2 :] = 0.0  # exported with ranks 1 and 2
            layer.gate[: 1 + i % 2] = 0.5
    assert (denoised(model) - denoised(unet())).abs().max() > 1e-2
    return model


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"safe_serialization": False}, {"max_shard_size": "20KB"}, {"variant": "mine"}], ids=str
)
def test_a_saved_model_denoises_as_the_trained_one(options, tmp_path):
    model = patched()
    model.save_pretrained(tmp_path, **options)
    kind = {"variant": options.get("variant"), "use_safetensors": options.get("safe_serialization", True)}
    close(denoised(diffusers.UNet2DConditionModel.from_pretrained(tmp_path, **kind)), denoised(model))


def test_a_merged_model_saves_its_weights(tmp_path):
    model = l1ra.merge(patched())
    model.save_pretrained(tmp_path)
    assert torch.equal(denoised(diffusers.UNet2DConditionModel.from_pretrained(tmp_path)), denoised(model))


def test_a_pipeline_is_saved_with_its_patched_models(tmp_path):
    model, text = patched(), text_encoder()
    l1ra.patch(text, 28)
    shake(text, 1.0)
    pipeline(model, text).save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    close(denoised(again), denoised(model))
    ids = torch.arange(10)[None]
    again = type(text).from_pretrained(tmp_path / "text_encoder")
    close(again(ids).last_hidden_state, text(ids).last_hidden_state)
    assert "adapter_config.json" not in os.listdir(tmp_path / "text_encoder")


def test_a_pipeline_finds_the_options_of_a_patched_text_encoder():
    text = text_encoder()
    before = inspect.signature(text.save_pretrained)
    l1ra.patch(text, 28)
    assert inspect.signature(text.save_pretrained) == before


def pipeline(model, text=None):
    scheduler = diffusers.DDIMScheduler()
    parts = dict.fromkeys(("vae", "tokenizer", "safety_checker", "feature_extractor"))
    return diffusers.StableDiffusionPipeline(
        unet=model, text_encoder=text, scheduler=scheduler, requires_safety_checker=False, **parts
    )


@pytest.mark.parametrize("uniform", [False, True, 5])
def test_a_lora_without_prefix_is_read_by_a_model(uniform, tmp_path):
    model, again = patched(), unet()
    l1ra.export_peft(model, tmp_path, uniform=uniform, prefix="")
    assert os.listdir(tmp_path) == [DIFFUSERS_WEIGHTS]
    again.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    close(denoised(again), denoised(model))


def test_pefts_files_are_read_by_a_model_that_is_told_their_prefix(tmp_path):
    model, again = patched(), unet()
    l1ra.export_peft(model, tmp_path)
    again.load_lora_adapter(tmp_path, weight_name="adapter_model.safetensors", prefix="base_model.model")
    close(denoised(again), denoised(model))


@pytest.mark.parametrize("prefix", ["unet", "unet."])
def test_a_lora_with_the_models_name_is_read_by_a_pipeline(prefix, tmp_path):
    model, again = patched(), unet()
    l1ra.export_peft(model, tmp_path, prefix=prefix)
    assert all(
        name.startswith("unet.down_blocks.") or "lora" in name for name in load_file(tmp_path / DIFFUSERS_WEIGHTS)
    )
    pipeline(again).load_lora_weights(tmp_path)
    close(denoised(again), denoised(model))


def test_a_lora_is_swapped_for_another_of_the_same_rank(tmp_path):
    first, second, again = patched(), patched(), unet()
    shake(second, 2.0)
    for model, name in ((first, "first"), (second, "second")):
        l1ra.export_peft(model, tmp_path / name, uniform=4, prefix="")
    settings = {"prefix": None, "use_safetensors": True, "adapter_name": "a"}
    again.load_lora_adapter(tmp_path / "first", **settings)
    again.load_lora_adapter(tmp_path / "second", hotswap=True, **settings)
    close(denoised(again), denoised(second))


def test_what_is_trained_in_full_is_refused_by_name(tmp_path):
    model = unet()
    l1ra.patch(model, 64, target_modules=ATTENTION, modules_to_save=["conv_out"])
    with pytest.raises(ValueError, match="diffusers reads no more than a LoRA, and conv_out is trained in full"):
        l1ra.export_peft(model, tmp_path / "lora", prefix="")
    assert not (tmp_path / "lora").exists()
