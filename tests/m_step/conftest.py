"""Tiny policies, accepted datasets and trainers for the M-step tests."""

import os
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from restem_lightning.m_step import AcceptedDataModule, PolicyModule

VOCAB = 64
EOS = 1
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8, "intermediate_size": 50},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "head_dim": 8, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 4, "head_dim": 8, "final_logit_softcapping": 2.0},
    "phi": {},
    "phi3": {},
    "glm": {"head_dim": 8},
    "olmo2": {},
    "starcoder2": {},
    "cohere2": {"sliding_window": 4, "head_dim": 8},
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def make_policy(tmp_path):
    def make(family="llama", name="policy", tie=False) -> Path:
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family,
            hidden_size=32,
            num_hidden_layers=2,
            vocab_size=VOCAB,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tie,
            eos_token_id=EOS,
            bos_token_id=0,
            pad_token_id=0,
            initializer_range=0.2,
            **({"intermediate_size": 48} | FAMILIES[family]),
        )
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(tmp_path / name)
        words = {"<pad>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(2, VOCAB)}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), eos_token="<eos>"
        )
        tokenizer.chat_template = "{{ messages[0]['content'] }}"
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def make_accepted(tmp_path):
    def make(rows=None, name="accepted.parquet", size=24) -> Path:
        generator = np.random.default_rng(0)
        if rows is None:
            rows = []
            for _ in range(size):
                prompt, completion = (
                    generator.integers(2, VOCAB, generator.integers(2, 9)).tolist()
                    for _ in range(2)
                )
                rows.append((prompt, [*completion, EOS], 1.0))
        prompts, completions, weights = zip(*rows, strict=True) if rows else ([], [], [])
        table = pa.table(
            {
                "problem_id": [f"p{i}" for i in range(len(rows))],
                "completion_index": list(range(len(rows))),
                "prompt_ids": pa.array(prompts, pa.list_(pa.int32())),
                "completion_ids": pa.array(completions, pa.list_(pa.int32())),
                "weight": pa.array(weights, pa.float32()),
            }
        )
        pq.write_table(table, tmp_path / name)
        return tmp_path / name

    return make


class Recorder(pl.Callback):
    """Keeps the loss of each optimizer step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train_loss"].item())


@pytest.fixture
def fit(tmp_path):
    """Fits a fresh module; returns (module, losses, trainer)."""

    def run(policy, accepted, *, module=None, data=None, callbacks=(), ckpt_path=None, **trainer):
        recorder = Recorder()
        saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        fitted = PolicyModule(str(policy), **({"learning_rate": 1e-2} | (module or {})))
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=tmp_path,
            callbacks=[*callbacks, recorder],
            **(
                {
                    "max_epochs": 2,
                    "enable_checkpointing": saves,
                }
                | trainer
            ),
        )
        datamodule = AcceptedDataModule(str(accepted), **({"batch_size": 8} | (data or {})))
        trainer.fit(fitted, datamodule, ckpt_path=ckpt_path)
        return fitted, recorder.losses, trainer

    return run
