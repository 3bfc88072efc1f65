"""Stage `video`: objects followed through videos by frozen features."""
