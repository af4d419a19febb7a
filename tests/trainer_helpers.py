"""What tests with a transformers Trainer share: a tiny training that can be learnt."""

import torch
from torch import nn

STEPS = 30


def sentences(count=64, length=10):
    generator = torch.Generator().manual_seed(3)
    starts = torch.randint(0, 50, (count, 1), generator=generator)
    ids = (starts + 3 * torch.arange(length)) % 50  # a pattern that can be learnt
    return [{"input_ids": row, "labels": row} for row in ids]


def livelier(model):
    """Random tiny models have weights too small to learn anything from."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, 0, 0.2)
    return model


def arguments(path, **kwargs):
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 5,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return {"output_dir": str(path), **settings, **kwargs}


def labelled():
    return [{"input_ids": row["input_ids"], "labels": int(row["input_ids"][0]) % 3} for row in sentences()]


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[EOS]": 1, "[UNK]": 2, **{f"w{i}": i for i in range(3, 50)}}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", eos_token="[EOS]", unk_token="[UNK]")


def act_as_gpus(kind):
    """accelerate takes ``kind``, FSDP (``MULTI_GPU``) or DeepSpeed, on GPUs only: let it take these processes for some
    with GPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType[kind]
