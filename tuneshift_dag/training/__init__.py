"""LoRA training: the loop, its loss, checkpoints and processes. Nothing here knows Dagster."""
