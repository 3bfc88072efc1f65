"""Stage `segment`: semantic segmentation on ADE20K."""
