"""The embedded dataset: handwritten digits composed on photographic textures; nothing is downloaded."""
