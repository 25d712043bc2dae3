"""File names in run folders and exported folders."""

__all__ = [
    "CARD",
    "CHECKPOINTS",
    "EMA_WEIGHTS",
    "EVALUATION",
    "EXPORT_CONFIG",
    "LAST",
    "LIBRARY",
    "RUN_CONFIG",
    "SUMMARY",
    "WEIGHTS",
]

#: Weights at the top of a run folder or an exported folder.
WEIGHTS, EMA_WEIGHTS = "model.safetensors", "model_ema.safetensors"
#: A run's config, its checkpoints folder, and the checkpoint that holds the run's final weights.
RUN_CONFIG, CHECKPOINTS, LAST = "config.yaml", "checkpoints", "last.ckpt"
#: Results of a run: written when training ends, and by an evaluation.
SUMMARY, EVALUATION = "summary.json", "evaluation.json"
#: An exported folder's config and model card, and the ``library_name`` in that config.
EXPORT_CONFIG, CARD, LIBRARY = "config.json", "README.md", "bcos-train"
