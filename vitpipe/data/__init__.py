"""What a training step sees: shards, storage, order, batches, augmentation, masks."""
