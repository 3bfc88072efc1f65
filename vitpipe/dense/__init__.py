"""Object detection and semantic segmentation with mmdet and mmseg; imported only by the dense stages."""
