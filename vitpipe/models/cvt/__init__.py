"""CvT: attention whose queries, keys and values are made by convolutions."""
