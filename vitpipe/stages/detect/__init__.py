"""Stage `detect`: detection and instance segmentation on COCO."""
