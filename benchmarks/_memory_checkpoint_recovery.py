"""The ranks of ``memory_checkpoint_recovery.py``: the training of the recipe ``survive``, and when a rank has come to what.

Under `lightning run` a YAML names ``Marks`` between the other callbacks; torchrun runs this file as a script:

    torchrun --nproc-per-node=2 --max-restarts=20 benchmarks/_memory_checkpoint_recovery.py PROCESSES JOB

``RECOVERY_FOLDER`` names the folder of the ranks' journals.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from lightning_plugins._lightning import Callback, LightningModule, Trainer
from lightning_plugins.callbacks.memory_checkpoint import MemoryCheckpoint
from lightning_plugins.recipes.survive_journal import Journal
from lightning_plugins.recipes.survive_learner import Learner

FOLDER = "RECOVERY_FOLDER"
CADENCE, EPOCHS = 10, 100_000
MET, FOUND = "met", "found"
# What every rank comes to after a kill, in this order.
REACHED = ("started", "ready", MET, FOUND, "step")


class Marks(Callback):
    """Writes when it is made, and when the run has come so far that it sets up its callbacks, this one among them.

    Args:
        reached: ``met`` for the first of all, when the ranks have met, and ``found`` for the last, when a state has been found.
    """

    def __init__(self, reached: str) -> None:
        path = Path(os.environ[FOLDER]) / f"rank{os.environ['RANK']}.jsonl"
        self.reached, self.journal = reached, Journal(path, pid=os.getpid())
        if reached == MET:
            self.journal.write(kind="started", seconds=_started_s())
            self.journal.write(kind="ready")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.journal.write(kind=self.reached)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.reached == FOUND:
            self.journal.write(kind="step", step=trainer.global_step)


def _started_s() -> float:
    """Return when this process was made, by the monotonic clock, to 10 ms."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    ago_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - ago_s


def main() -> None:
    """Train as one of torchrun's ranks."""
    processes, job = int(sys.argv[1]), sys.argv[2]
    memory = MemoryCheckpoint(job=job, every_n_steps=CADENCE, disk_dir=False)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        strategy="ddp",
        devices=processes,
        callbacks=[Marks(MET), memory, Marks(FOUND)],
        default_root_dir=os.environ[FOLDER],
        **settings,
    )
    trainer.fit(Learner(processes, EPOCHS))


if __name__ == "__main__":
    main()
