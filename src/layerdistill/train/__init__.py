"""The Trainer, the stage runner, resume and logging."""
