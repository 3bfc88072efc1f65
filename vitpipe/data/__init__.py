"""What is seen: catalogue, packing, shards, order, batches, augmentation, masks, scenes."""
