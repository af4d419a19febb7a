"""The Python on the page "From training to serving" runs as it stands, and what it writes computes the same."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import llama, same_bits, tokens
from torch.utils.data import Dataset

import l1ra

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"


class Sentences(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(50, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


@torch.no_grad()
def computed(model):
    return model.eval()(tokens()).logits


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The folder in which the blocks ran, the names they left, and what the model computed after each of them."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(0)
    llama().save_pretrained(folder / "base-model")
    names, logits = {"dataset": Sentences()}, {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.S | re.M):
            exec(compile(block, str(PAGE), "exec"), names)
            if "model" in names:
                logits[block] = computed(names["model"])
    return folder, names, logits


def after(logits, text):
    (found,) = (value for block, value in logits.items() if text in block)
    return found


def read(folder, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base-model")
    return computed(PeftModel.from_pretrained(base, folder / name))


def test_ranks_moved_and_the_export_computes_what_the_model_did(page):
    folder, names, logits = page
    assert json.loads((folder / "lora-uneven" / "adapter_config.json").read_text())["rank_pattern"]
    trained = after(logits, 'lora-uneven")   ')
    torch.testing.assert_close(computed(names["tuned"]), trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read(folder, "lora-uneven"), trained, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(read(folder, "lora-uneven"), read(folder, "lora"), atol=1e-3)


def test_the_resumed_training_ends_where_the_other_did(page):
    _, _, logits = page
    assert same_bits(after(logits, "resume_from_checkpoint"), after(logits, 'lora-uneven")   '))
    assert same_bits(after(logits, 'controller.save("adapter")'), after(logits, "resume_from_checkpoint"))


def test_the_merged_model_needs_nothing_of_l1ra(page):
    from transformers import AutoModelForCausalLM

    folder, _, logits = page
    merged = computed(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    torch.testing.assert_close(merged, after(logits, 'controller.save("adapter")'), rtol=1e-4, atol=1e-5)


def test_exports_stand_beside_other_loras(page):
    folder, names, _ = page
    served = names["served"]
    torch.testing.assert_close(computed(served), read(folder, "lora"))
    served.set_adapter("default")
    torch.testing.assert_close(computed(served), read(folder, "lora-uneven"))


def test_somebodys_lora_goes_on_with_a_larger_budget(page):
    folder, names, _ = page
    controller = names["controller"]
    assert controller.spare == 8 and sum(controller.ranks.values()) == 4 * 14
    torch.testing.assert_close(computed(names["model"]), read(folder, "lora"), rtol=1e-5, atol=1e-5)
    l1ra.unpatch(names["model"])
