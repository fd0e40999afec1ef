"""The table of methods: what ``lightning_plugins`` offers, by public name. It feeds the lazy imports, ``lightning ls``
and ``lightning info``; the README's table and the cards are tested against it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One public name.

    Attributes:
        room: ``models``, ``datamodules``, ``callbacks`` or ``strategies``.
        module: the module that defines the name.
        tier: ``stable``, ``beta`` or ``simulation``.
        summary: its use in one line.
        card: the page under ``docs/methods``, without ending.
    """

    room: str
    module: str
    tier: str
    summary: str
    card: str


@dataclass(frozen=True)
class Recipe:
    """One recipe: a YAML of knobs, and a script of the same name where there are several phases.

    Attributes:
        summary: its use in one line.
        card: the page under ``docs/methods``, without ending.
        nproc_per_node: processes on each machine, where ``--nproc-per-node`` does not say how many.
    """

    summary: str
    card: str
    nproc_per_node: int = 1


_DEPTH = "lightning_plugins.models.panoramic_depth.module"
_UPRIGHT = "lightning_plugins.models.panoramic_upright.module"
_DATA = "lightning_plugins.datamodules"

METHODS: dict[str, Method] = {
    "PanoramicDepth": Method("models", _DEPTH, "beta", "depth in metres from one 360-degree photograph", "panoramic_depth"),
    "DepthTeacher": Method(
        "models", _DEPTH, "beta", "autoencoder of depth whose latent features teach PanoramicDepth", "panoramic_depth"
    ),
    "PanoramicUpright": Method(
        "models", _UPRIGHT, "beta", "where up is in a 360-degree photograph, and the photograph levelled", "panoramic_upright"
    ),
    "RenderedRooms": Method(
        "datamodules", f"{_DATA}.rendered_rooms", "beta", "ray-cast rooms with exact depth, made on the spot", "panoramic_depth"
    ),
    "PanoramaFolder": Method(
        "datamodules", f"{_DATA}.panorama_folder", "beta", "any folder of 2:1 panoramic photographs", "panoramic_depth"
    ),
    "SUN360": Method(
        "datamodules",
        f"{_DATA}.sun360",
        "beta",
        "SUN360's level photographs under random tilts, in its splits",
        "panoramic_upright",
    ),
    "PanoramaReport": Method(
        "callbacks",
        "lightning_plugins.callbacks.panorama_report",
        "beta",
        "depth previews and a one-file report of any depth model",
        "panoramic_depth",
    ),
    "Preconditioner": Method(
        "callbacks",
        "lightning_plugins.callbacks.preconditioner",
        "beta",
        "second-order directions (K-FAC, SOAP, Shampoo and relatives) for any module and optimizer",
        "preconditioner",
    ),
    "MemoryCheckpoint": Method(
        "callbacks",
        "lightning_plugins.callbacks.memory_checkpoint.callback",
        "beta",
        "the whole training state in memory outside of the trainer, every few steps; a crashed run goes on with the same bits",
        "memory_checkpoint",
    ),
    "VerifiedCheckpointIO": Method(
        "strategies",
        "lightning_plugins.strategies.verified_checkpoint",
        "beta",
        "ordinary checkpoints that carry a checksum: written whole or not at all, and no damage of theirs is loaded",
        "memory_checkpoint",
    ),
    "OkTopkStrategy": Method(
        "strategies",
        "lightning_plugins.strategies.ok_topk",
        "beta",
        "DDP whose gradients travel as their largest 1 %, the rest kept as residual",
        "ok_topk",
    ),
    "OkTopkFabricStrategy": Method(
        "strategies",
        "lightning_plugins.strategies.ok_topk_fabric",
        "beta",
        "the same for a loop of your own in Fabric",
        "ok_topk",
    ),
}

RECIPES: dict[str, Recipe] = {
    "panoramic_depth": Recipe("train a panoramic depth model on rendered rooms and run it on photographs", "panoramic_depth"),
    "panoramic_upright": Recipe(
        "train an upright model on rendered rooms, compare it with vertical lines, and level photographs and videos",
        "panoramic_upright",
    ),
    "level_then_depth": Recipe(
        "train an upright and a depth model, measure what levelling recovers of depth, run both on tilted photographs",
        "panoramic_upright",
    ),
    "precondition_compare": Recipe("train one small net with AdamW, SGD and every method of Preconditioner", "preconditioner"),
    "ok_topk_compare": Recipe(
        "train a small CNN and a character model on two processes, densely, with Ok-Topk and with PowerSGD", "ok_topk", 2
    ),
    "survive": Recipe(
        "train a small net in two processes, kill one of them three times and show that the run ends with the same bits",
        "memory_checkpoint",
    ),
}
