"""The source of a module that a YAML of the launching tests names, and the YAML."""

import copy

import yaml

PARTS = '''
import os
import torch
from {namespace} import Callback, LightningDataModule, LightningModule


class Boring(LightningModule):
    def __init__(self, width: int = 4, defect: bool = False, breaks: str | None = None):
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be 1 or more,\\n  got {{width}}")
        if defect:
            raise AttributeError("a defect in the constructor")
        self.layer = torch.nn.Linear(4, width)
        self.breaks = breaks

    def training_step(self, batch, batch_idx):
        if self.breaks == "training":
            raise ValueError("a defect in the training step")
        if self.breaks == "logging":
            self.log("x", 1.0, reduce_fx="wibble")
        return self.layer(batch).square().mean()

    def validation_step(self, batch, batch_idx):
        if self.breaks == "validation":
            raise ValueError("a defect in the validation step")
        self.log("val_loss", self.layer(batch).square().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Noise(LightningDataModule):
    def __init__(self, size: int = 8):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        data = torch.randn(self.size, 4, generator=torch.Generator().manual_seed(0))
        return torch.utils.data.DataLoader(data, batch_size=4)

    val_dataloader = train_dataloader


class Notes(Callback):
    """Writes what each rank saw; rank 1 fails in the first attempt, when the epoch begins that is named."""

    def __init__(self, dies: int | None = None):
        self.dies = dies

    def on_train_epoch_start(self, trainer, pl_module):
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if trainer.global_rank == 1 and attempt == 0 and self.dies == trainer.current_epoch:
            raise KeyError("rank 1 has a defect")

    def on_train_start(self, trainer, pl_module):
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        with open(os.path.join(trainer.default_root_dir, f"rank-{{trainer.global_rank}}-{{attempt}}"), "w") as file:
            print(trainer.world_size, trainer.num_devices, trainer.current_epoch, trainer.global_step, file=file)
'''
YAML = {
    "seed_everything": 0,
    "model": {"class_path": "parts.Boring"},
    "data": {"class_path": "parts.Noise", "init_args": {"size": 8}},
    "trainer": {
        "max_epochs": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "callbacks": [{"class_path": "parts.Notes"}],
    },
}


def write_parts(folder, namespace="lightning_plugins._lightning", change=lambda content: None, name="boring.yaml"):
    """Write the module and its YAML, changed by ``change``; return the YAML's path."""
    (folder / "parts.py").write_text(PARTS.format(namespace=namespace))
    content = copy.deepcopy(YAML)
    change(content)
    (folder / name).write_text(yaml.safe_dump(content))
    return folder / name
