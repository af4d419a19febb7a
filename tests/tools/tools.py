"""A table of the tools that users train with. One line in ``TOOLS`` is a tool; ``test_tools.py`` trains with each.

Each tool makes the same experiment: a small training whose ranks move; broken off half-way and saved as the tool saves;
resumed with everything built anew; and the result exported. ``table()`` is the table of ``docs/tools.md`` with the
versions that are installed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from trainer_helpers import arguments, labelled, sentences, tokenizer
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import l1ra

STEPS, HALF = 12, 6
MOVING = {"interval": 3, "min_interval": 3, "warmup": 0.0, "cooldown": 0.1, "margin": 1.0, "min_coherence": 0.0}
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
EXACT = "bit for bit"


def logits(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def _by_peft(model: nn.Module, base: Path, folder: Path) -> nn.Module:
    import peft

    l1ra.export_peft(model, folder)
    return peft.PeftModel.from_pretrained(type(model).from_pretrained(base), folder)


@dataclass(frozen=True)
class Tool:
    """A tool, and a training with it.

    Attributes:
        name, package: as in the table.
        train: ``train(base, folder, steps, stop, resume)`` loads the pretrained model from the folder ``base``, patches
            it and trains it to ``stop`` of ``steps``. It saves its checkpoint there, and resumes from it if ``resume``.
            Returns the model and its controller.
        base: makes the pretrained model.
        inputs: of the model, to compare outputs.
        outputs: of a model.
        loaded_by: the library that loads the result, as in the table.
        load: ``load(model, base, folder)`` saves the trained model into ``folder`` and loads it with that library.
        resumes: ``EXACT``, or why a resumed training is not the unbroken one.
        note: for the table.
        warns: a warning that is expected, a regular expression.
    """

    name: str
    package: str
    train: Callable[[Path, Path, int, int, bool], tuple[nn.Module, l1ra.RankController]]
    base: Callable[[], nn.Module]
    inputs: Any
    outputs: Callable[[nn.Module, Any], torch.Tensor] = logits
    loaded_by: str = "peft"
    load: Callable[[nn.Module, Path, Path], nn.Module] = _by_peft
    resumes: str = EXACT
    note: str = ""
    warns: str = ""


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **SIZES, num_key_value_heads=1, **SPECIAL))


def reward_llama() -> nn.Module:
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=50, **SIZES, num_key_value_heads=1, **SPECIAL, num_labels=1)
    )


def bert() -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=50, **SIZES, **dropout, num_labels=3))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    return T5ForConditionalGeneration(T5Config(vocab_size=50, **sizes, decoder_start_token_id=0, **SPECIAL))


IDS = {"input_ids": torch.arange(2, 22).reshape(2, 10)}
WITH_LABELS = {**IDS, "labels": IDS["input_ids"]}


def patched(
    base: Path, kind: Callable[[], nn.Module] = llama, **settings: Any
) -> tuple[nn.Module, l1ra.RankController]:
    cls = {llama: LlamaForCausalLM, reward_llama: LlamaForSequenceClassification}.get(kind)
    cls = cls or {bert: BertForSequenceClassification, t5: T5ForConditionalGeneration}[kind]
    model = cls.from_pretrained(base)
    layers = sum(isinstance(m, nn.Linear) for m in model.modules())
    return model, l1ra.patch(model, 4 * layers, **{**MOVING, **settings})


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


def _with_trainer(kind: Callable[[], nn.Module], make: Callable[..., Trainer]) -> Callable[..., Any]:
    """A training with a Trainer: ``make(model, settings, callbacks)``."""

    def train(base: Path, folder: Path, steps: int, stop: int, resume: bool):
        model, controller = patched(base, kind)
        settings = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=HALF, seed=5)
        made = make(model, settings, [_StopAt(stop)] if stop < steps else [])
        made.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
        return model, controller

    return train


def _trainer(model, settings, callbacks):
    data = labelled() if isinstance(model, BertForSequenceClassification) else sentences()
    return Trainer(model, TrainingArguments(**settings), train_dataset=data, callbacks=callbacks)


def _seq2seq(model, settings, callbacks):
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    return Seq2SeqTrainer(model, Seq2SeqTrainingArguments(**settings), train_dataset=sentences(), callbacks=callbacks)


WORDS = [f"w{i}" for i in range(3, 50)]


def _pairs() -> list[dict[str, str]]:
    return [
        {"prompt": w, "chosen": f" {WORDS[i - 2]} {WORDS[i - 4]}", "rejected": f" {WORDS[i - 9]} {WORDS[i - 5]}"}
        for i, w in enumerate(WORDS)
    ]


def _trl(
    name: str, rows: list[dict], module: str = "trl", own: Mapping[str, Any] = MappingProxyType({}), **settings: Any
) -> Callable[..., Trainer]:
    """One of TRL's trainers. ``own``: arguments of the trainer itself."""

    def make(model, common, callbacks):
        from datasets import Dataset

        trl = importlib.import_module(module)
        config = getattr(trl, f"{name}Config")(**common, bf16=False, **settings)
        trainer = getattr(trl, f"{name}Trainer")
        data = Dataset.from_list(rows)
        return trainer(model, args=config, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks, **own)

    return make


LABELLED = [
    {"prompt": row["prompt"], "completion": row[key], "label": key == "chosen"}
    for row in _pairs()
    for key in ("chosen", "rejected")
]


def _length_reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


GENERATION = {"num_generations": 4, "max_completion_length": 4, "own": {"reward_funcs": _length_reward}}


def _own_loop(make_optimizer: Callable[[nn.Module], Optimizer], train_mode: str = "") -> Callable[..., Any]:
    """A loop of the user's own, which saves the controller and the optimizer."""

    def train(base: Path, folder: Path, steps: int, stop: int, resume: bool):
        torch.manual_seed(3)
        begin = 0
        if resume:
            model = LlamaForCausalLM.from_pretrained(base)
            controller, begin = l1ra.load(model, folder / "adapter"), HALF
        else:
            model, controller = patched(base, total_steps=steps)
        optimizer = make_optimizer(model)
        if resume:
            optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=False))
        rows = torch.stack([row["input_ids"] for row in sentences()])
        for i in range(begin, stop):
            if train_mode:
                getattr(optimizer, train_mode)()
            batch = rows[4 * i : 4 * i + 4]
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if stop == HALF:
            controller.save(folder / "adapter")
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        return model, controller

    return train


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _lora_plus(model: nn.Module) -> Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4.0)


def _muon(model: nn.Module) -> Optimizer:
    return torch.optim.Muon([p for p in model.parameters() if p.requires_grad and p.dim() == 2], lr=1e-2)


def _schedule_free(model: nn.Module) -> Optimizer:
    import schedulefree

    return schedulefree.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def _eight_bit(model: nn.Module) -> Optimizer:
    import bitsandbytes

    params = [p for p in model.parameters() if p.requires_grad]
    return bitsandbytes.optim.AdamW8bit(params, lr=1e-2, min_8bit_size=64)


def _galore(model: nn.Module) -> Optimizer:
    from galore_torch import GaLoreAdamW

    flat = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
    wide = [p for p in model.parameters() if p.requires_grad and p.dim() == 2]
    galore = {"params": wide, "rank": 2, "update_proj_gap": 4, "scale": 1.0, "proj_type": "std"}
    return GaLoreAdamW([{"params": flat}, galore], lr=1e-2)


def _accelerate(base: Path, folder: Path, steps: int, stop: int, resume: bool):
    from accelerate import Accelerator

    model, controller = patched(base, total_steps=steps)
    accelerator = Accelerator(cpu=True)
    rows = torch.stack([row["input_ids"] for row in sentences()])
    made, optimizer = accelerator.prepare(model, _adamw(model))
    accelerator.register_for_checkpointing(controller)
    if resume:
        accelerator.load_state(str(folder / "state"))
    for i in range(HALF if resume else 0, stop):
        batch = rows[4 * i : 4 * i + 4]
        accelerator.backward(made(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    if stop == HALF:
        accelerator.save_state(str(folder / "state"))
    return model, controller


def _lightning(base: Path, folder: Path, steps: int, stop: int, resume: bool):
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.controller = patched(base, total_steps=steps)

        def training_step(self, batch):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return _adamw(self.model)

        def on_save_checkpoint(self, checkpoint):
            checkpoint["l1ra"] = self.controller.state_dict()

        def on_load_checkpoint(self, checkpoint):
            # The optimizers' state, which is loaded next, has the shapes of the saved ranks.
            self.load_state_dict(checkpoint["state_dict"])
            self.controller.load_state_dict(checkpoint["l1ra"])

    # Lightning begins the epoch anew in which it was broken off. These are as long as half of the training.
    module = Module()
    rows = torch.stack([row["input_ids"] for row in sentences(4 * HALF)])
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = lightning.Trainer(max_epochs=stop // HALF, accelerator="cpu", **quiet)
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    trainer.fit(module, loader, ckpt_path=str(folder / "half.ckpt") if resume else None, weights_only=False)
    if stop == HALF:
        trainer.save_checkpoint(folder / "half.ckpt")
    return module.model, module.controller


def _embedder(base: Path) -> nn.Module:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    return SentenceTransformer(modules=[Transformer(str(base)), Pooling(16)], device="cpu")


def _sentence_transformers(base: Path, folder: Path, steps: int, stop: int, resume: bool):
    import sentence_transformers as st
    from datasets import Dataset
    from sentence_transformers.losses import MultipleNegativesRankingLoss

    model = _embedder(base)
    layers = r".*encoder\.layer.*(query|key|value|dense)"  # the pooler is not called
    controller = l1ra.patch(model, 24, target_modules=layers, **MOVING)
    texts = [" ".join(WORDS[(i + 3 * j) % 47] for j in range(6)) for i in range(49)]
    data = Dataset.from_dict({"anchor": texts[:-1], "positive": texts[1:]})
    settings = arguments(folder, max_steps=steps, save_strategy="steps", save_steps=HALF, seed=5)
    trainer = st.SentenceTransformerTrainer(
        model,
        st.SentenceTransformerTrainingArguments(**settings),
        train_dataset=data,
        loss=MultipleNegativesRankingLoss(model),
        callbacks=[_StopAt(stop)] if stop < steps else None,
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return model, controller


def _encoded(model: nn.Module, texts: list[str]) -> torch.Tensor:
    return torch.tensor(model.eval().encode(texts))


def _by_sentence_transformers(model: nn.Module, base: Path, folder: Path) -> nn.Module:
    from sentence_transformers import SentenceTransformer

    model.save_pretrained(str(folder))
    return SentenceTransformer(str(folder), device="cpu")


def encoder() -> nn.Module:
    return bert().bert


def unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def _diffusers(base: Path, folder: Path, steps: int, stop: int, resume: bool):
    """As diffusers' LoRA scripts: noise is predicted, an EMA runs along, accelerate saves the state."""
    from accelerate import Accelerator
    from diffusers import DDPMScheduler, UNet2DConditionModel
    from diffusers.training_utils import EMAModel

    model = UNet2DConditionModel.from_pretrained(base)
    attention = ["to_q", "to_k", "to_v", "to_out.0"]
    controller = l1ra.patch(model, 64, target_modules=attention, total_steps=steps, **MOVING)
    accelerator = Accelerator(cpu=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    average = EMAModel(trained, decay=0.9)
    controller.follow(average)
    made, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, lr=1e-2))
    accelerator.register_for_checkpointing(controller)
    if resume:
        accelerator.load_state(str(folder / "state"))
        average = EMAModel(trained, decay=0.9)
        average.load_state_dict(torch.load(folder / "ema.pt"))
        controller.follow(average)
    noise = DDPMScheduler(num_train_timesteps=50)
    for i in range(HALF if resume else 0, stop):
        generator = torch.Generator().manual_seed(i)
        latents, text, target = (torch.randn(2, *s, generator=generator) for s in ((4, 8, 8), (5, 16), (4, 8, 8)))
        times = torch.randint(0, 50, (2,), generator=generator)
        found = made(noise.add_noise(latents, target, times), times, text).sample
        accelerator.backward((found - target).square().mean())
        optimizer.step()
        optimizer.zero_grad()
        average.step(trained)
    if stop == HALF:
        accelerator.save_state(str(folder / "state"))
        torch.save(average.state_dict(), folder / "ema.pt")
    average.copy_to(trained)
    return model, controller


def _denoised(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    with torch.no_grad():
        return model.eval()(x, torch.tensor([3, 40]), text).sample


def _by_diffusers(model: nn.Module, base: Path, folder: Path) -> nn.Module:
    from diffusers import UNet2DConditionModel

    l1ra.export_peft(model, folder, prefix="")
    fresh = UNet2DConditionModel.from_pretrained(base)
    fresh.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    return fresh


TOOLS = [
    Tool("Trainer", "transformers", _with_trainer(llama, _trainer), llama, IDS),
    Tool("Trainer, classifier", "transformers", _with_trainer(bert, _trainer), bert, IDS),
    Tool("Seq2SeqTrainer", "transformers", _with_trainer(t5, _seq2seq), t5, WITH_LABELS),
    Tool(
        "SFTTrainer",
        "trl",
        _with_trainer(llama, _trl("SFT", [{"text": " ".join(WORDS[i : i + 8])} for i in range(40)])),
        llama,
        IDS,
    ),
    Tool(
        "DPOTrainer",
        "trl",
        _with_trainer(llama, _trl("DPO", _pairs(), max_length=16)),
        llama,
        IDS,
        note="the reference: `controller.disabled()`, see [usage](usage.md)",
    ),
    Tool("KTOTrainer", "trl", _with_trainer(llama, _trl("KTO", LABELLED, max_length=16)), llama, IDS),
    Tool(
        "ORPOTrainer",
        "trl",
        _with_trainer(llama, _trl("ORPO", _pairs(), "trl.experimental.orpo", max_length=16)),
        llama,
        IDS,
    ),
    Tool(
        "RewardTrainer",
        "trl",
        _with_trainer(
            reward_llama,
            _trl("Reward", [{k: r["prompt"] + r[k] for k in ("chosen", "rejected")} for r in _pairs()], max_length=16),
        ),
        reward_llama,
        IDS,
    ),
    Tool(
        "GRPOTrainer",
        "trl",
        _with_trainer(llama, _trl("GRPO", [{"prompt": w} for w in WORDS], **GENERATION)),
        llama,
        IDS,
        note="with `beta` above 0 the reference is the base model as it was saved",
    ),
    Tool(
        "RLOOTrainer",
        "trl",
        _with_trainer(llama, _trl("RLOO", [{"prompt": w} for w in WORDS], **GENERATION)),
        llama,
        IDS,
    ),
    Tool(
        "SentenceTransformerTrainer",
        "sentence-transformers",
        _sentence_transformers,
        encoder,
        ["w3 w6 w9 w12", "w20 w23"],
        _encoded,
        "sentence-transformers",
        _by_sentence_transformers,
        note="adapters are merged into what it saves",
    ),
    Tool(
        "a UNet, with EMAModel",
        "diffusers",
        _diffusers,
        unet,
        1,
        _denoised,
        "diffusers",
        _by_diffusers,
        note="`controller.follow(ema)`; the average is what is exported, with `prefix=`",
    ),
    Tool("accelerate", "accelerate", _accelerate, llama, IDS),
    Tool("Lightning", "lightning", _lightning, llama, IDS, note="the controller's state in two hooks of the module"),
    Tool("own loop, AdamW", "torch", _own_loop(_adamw), llama, IDS),
    Tool("own loop, Muon", "torch", _own_loop(_muon), llama, IDS, note="give it A and B only: gates need no optimizer"),
    Tool("LoRA+", "peft", _own_loop(_lora_plus), llama, IDS),
    Tool("schedule-free AdamW", "schedulefree", _own_loop(_schedule_free, "train"), llama, IDS),
    Tool("8-bit AdamW", "bitsandbytes", _own_loop(_eight_bit), llama, IDS),
    Tool(
        "GaLore AdamW",
        "galore-torch",
        _own_loop(_galore),
        llama,
        IDS,
        warns="the state of that parameter starts anew",
        note="projected moments can't move: where a rank moves they start anew, with a warning",
    ),
]


def version(package: str) -> str:
    return importlib.metadata.version(package).split("+")[0]


def rows() -> list[tuple[str, ...]]:
    """The rows of ``docs/tools.md``: the tool, its package, how it resumes, what loads its result, and the note."""
    return [(tool.name, tool.package, tool.resumes, tool.loaded_by, tool.note) for tool in TOOLS]


def table() -> str:
    """The table, with the versions that are installed."""
    lines = ["| tool | tested with | resumed half-way | loaded by | |", "|---|---|---|---|---|"]
    lines += [f"| {name} | {package} {version(package)} | {' | '.join(rest)} |" for name, package, *rest in rows()]
    return "\n".join(lines)
