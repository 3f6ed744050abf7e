"""Fine-tuning: data, batches, losses, the trainer and its command."""
