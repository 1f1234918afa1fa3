"""What a user writes: `transfer.yaml` and the files beside it, read and checked. No model and no database."""
