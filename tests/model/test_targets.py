"""Which layers are adapted, and what is said when a name fits nothing."""

import re
import warnings

import pytest
import torch
from helpers import MLP, SIZES, assert_untouched, bert, gpt2, llama, snapshot
from torch import nn

import l1ra
from l1ra.layers.linear import L1RALinear

PROJECTIONS = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def adapted(model, **kwargs):
    return list(l1ra.patch(model, 60, **kwargs).ranks)


def ends(names):
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def test_all_linear_is_every_linear_but_the_head():
    names = adapted(llama())
    assert ends(names) == PROJECTIONS and len(names) == 14


def test_all_linear_takes_conv1d():
    assert ends(adapted(gpt2())) == ["c_attn", "c_fc", "c_proj"]


def test_all_linear_leaves_the_classification_head_to_full_training():
    names = adapted(bert())
    assert "classifier" not in names and "bert.pooler.dense" in names


def test_all_linear_leaves_both_layers_of_a_fresh_head_to_full_training():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    model = DistilBertForSequenceClassification(DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=24))
    assert not [name for name in adapted(model) if "classifier" in name]
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"distilbert", "pre_classifier", "classifier"}


def test_names_are_whole_components():
    model = llama()
    assert ends(adapted(model, target_modules=["q_proj", "mlp.up_proj"])) == ["q_proj", "up_proj"]
    l1ra.unpatch(model)
    assert adapted(model, target_modules=("model.layers.1.self_attn.k_proj",)) == ["model.layers.1.self_attn.k_proj"]
    l1ra.unpatch(model)
    with pytest.raises(ValueError, match="no module is named 'proj'"):
        l1ra.patch(model, 60, target_modules=["proj"])


def test_a_string_is_a_regular_expression_for_the_whole_name():
    model = llama()
    names = adapted(model, target_modules=r".*layers\.0\..*\.(q|v)_proj")
    assert names == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    l1ra.unpatch(model)
    with pytest.raises(ValueError, match=re.escape("for a suffix write ['q_proj']")):
        l1ra.patch(model, 60, target_modules="q_proj")


def test_the_head_is_adapted_when_it_is_named():
    model = llama()
    assert adapted(model, target_modules=["lm_head"]) == ["lm_head"]
    assert isinstance(model.lm_head, L1RALinear)


def test_a_shared_layer_answers_to_all_its_names():
    model = nn.Module()
    model.first = nn.Linear(4, 4)
    model.second = model.first
    for target in (["second"], "sec.*", ["first"], "all-linear"):
        assert adapted(model, target_modules=target) == ["first"]
        assert model.first is model.second and isinstance(model.first, L1RALinear)
        l1ra.unpatch(model)


def refused(model, target_modules, message, error=ValueError, **kwargs):
    before = snapshot(model)
    with pytest.raises(error, match=message):
        l1ra.patch(model, 60, target_modules=target_modules, **kwargs)
    assert_untouched(model, before)


def test_an_unknown_name_lists_what_could_have_been_meant():
    refused(llama(), ["q_projj"], "no module is named 'q_projj'. Did you mean 'q_proj'")
    refused(llama(), ["query"], f"The linear layers are named: {', '.join(sorted([*PROJECTIONS, 'lm_head']))}")
    refused(llama(), ["q_proj", "w_proj"], "'w_proj'")
    refused(llama(), r".*\.qproj", "fits no module as a regular expression.*Did you mean 'q_proj'")


def test_a_broken_regular_expression_is_named():
    refused(llama(), "(q_proj", r"target_modules='\(q_proj' is no regular expression: missing \)")


def test_a_layer_that_can_not_be_adapted_is_named():
    refused(llama(), ["embed_tokens"], r"model.embed_tokens \(Embedding\).*Only nn.Linear, transformers' Conv1D")
    refused(llama(), ["q_proj", "norm"], r"model.norm \(LlamaRMSNorm\)")
    refused(llama(), r"model\.layers\.0.*", r"model.layers.0 \(LlamaDecoderLayer\)")


def test_what_can_not_be_adapted_can_be_trained_in_full():
    refused(llama(), ["embed_tokens"], r"modules_to_save=\['embed_tokens'\] trains them in full")
    message = r"\(LlamaMLP\), .* quantised linear layers can\.$"
    refused(llama(), ["mlp"], message)  # a container has no weights of its own


def mixture(kind="Mixtral", **settings):
    import transformers

    sizes = {**SIZES, "num_key_value_heads": 1, "num_local_experts": 4, **settings}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config)


def test_stacked_experts_are_left_out_in_words():
    model = mixture()
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    share = experts / sum(p.numel() for p in model.parameters())
    with pytest.warns(UserWarning) as said:
        names = adapted(model)
    assert ends(names) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    where = "model.layers.0.mlp.experts"
    assert [str(warning.message) for warning in said] == [
        f"{where}.gate_up_proj, {where}.down_proj and 2 more: {share:.0%} of the model's parameters are not adapted. "
        "Weights of more than two dimensions, such as stacked experts, can't be; modules_to_save=['experts'] trains "
        "them in full. Name the layers in target_modules if this is what you want."
    ]
    assert said[0].filename == __file__


def test_nothing_is_said_of_experts_that_were_meant_to_be_left_out_or_trained():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted(mixture(), target_modules=["q_proj"])
        adapted(mixture(), modules_to_save=["experts"])
        adapted(nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(4, 4), nn.Bilinear(2, 3, 4)))


def test_named_experts_are_refused_with_the_reason():
    told = r"experts\.gate_up_proj is no layer but a parameter of a MixtralExperts, of shape \(4, 48, 16\)"
    refused(mixture(), ["q_proj", "gate_up_proj"], f"{told}.*modules_to_save=\\['experts'\\] trains them in full")
    refused(mixture(), r".*\.gate_up_proj", told)
    refused(mixture(), ["experts"], r"mlp\.experts \(MixtralExperts\).*modules_to_save=\['experts'\]")


@pytest.mark.filterwarnings("ignore:.*stacked experts")
def test_a_router_that_only_inherits_from_linear_is_left_out():
    model = mixture("Llama4Text", num_experts_per_tok=1, intermediate_size_mlp=24, head_dim=8)
    assert isinstance(model.model.layers[0].feed_forward.router, nn.Linear)
    assert not [name for name in adapted(model) if "router" in name]
    l1ra.unpatch(model)
    refused(model, ["router"], r"router \(Llama4Router\)")


def test_a_weight_that_another_module_has_too_is_not_adapted():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "up": nn.Linear(4, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    message = r"head shares its weight with embed, .* modules_to_save=\['embed'\]"
    refused(model, ["head"], message)
    refused(model, "up|head", message)
    refused(model, ["head"], message, modules_to_save=["embed"])
    assert adapted(model) == ["up"]
    refused(llama(tie_word_embeddings=True), ["lm_head"], r"lm_head shares its weight with model\.embed_tokens")


@pytest.mark.parametrize("target", [None, 3, [], [1], {}, ["q_proj", None]])
def test_targets_of_a_wrong_type_are_refused(target):
    refused(llama(), target, "must be 'all-linear', a regular expression or a list of names", TypeError)


def test_a_layer_that_is_trained_in_full_can_not_be_a_target():
    refused(bert(), ["classifier"], "classifier: named in both")
    refused(llama(), ["up_proj"], "layers.1.mlp.up_proj: named in both", modules_to_save=["layers.1.mlp"])


def test_a_model_without_linear_layers_is_refused():
    refused(nn.Sequential(nn.Embedding(3, 3)), "all-linear", "has no linear layer besides its head")


def test_a_bare_linear_is_refused_with_a_way_out():
    refused(nn.Linear(4, 4), "all-linear", "L1RALinear.from_linear")


def test_the_output_projection_of_multihead_attention_is_never_adapted():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    refused(model, ["out_proj"], r"attention.out_proj \(NonDynamicallyQuantizableLinear\)")
    assert adapted(model) == ["linear"]


def test_an_encoder_layer_with_its_fast_path_is_refused_until_that_is_off():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False)
    refused(model, "all-linear", r"layers.0 is an nn.TransformerEncoderLayer.*set_fastpath_enabled\(False\)")
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        controller = l1ra.patch(model.eval(), 8)
        x = torch.randn(2, 3, 8)
        before = model(x)
        with torch.no_grad():
            for layer in controller.adapters.values():
                layer.lora_B.normal_()
        assert not torch.equal(model(x), before)  # the adapters are not skipped
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_names_of_the_controller_are_those_of_the_model():
    model = MLP()
    controller = l1ra.patch(model, 9)
    assert list(controller.ranks) == [n for n, m in model.named_modules() if isinstance(m, L1RALinear)]
