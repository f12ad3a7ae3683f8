"""The M-step: fine-tunes a policy on the accepted dataset and exports it as a policy folder."""

from restem_lightning.m_step.datamodule import AcceptedDataModule
from restem_lightning.m_step.export import (
    check_policy_folder,
    export_policy,
    load_best,
    policy_hash,
)
from restem_lightning.m_step.lora import LoraParams
from restem_lightning.m_step.module import PolicyModule
from restem_lightning.m_step.stopping import resume_checkpoint, stop_callbacks

__all__ = [
    "AcceptedDataModule",
    "LoraParams",
    "PolicyModule",
    "check_policy_folder",
    "export_policy",
    "load_best",
    "policy_hash",
    "resume_checkpoint",
    "stop_callbacks",
]
