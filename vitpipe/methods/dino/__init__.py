"""DINO: self-distillation without labels."""
