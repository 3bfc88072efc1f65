"""Plain vision transformers for masked pixels: with iTPN's pyramid, or as MAE has them."""
