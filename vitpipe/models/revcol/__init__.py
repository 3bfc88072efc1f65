"""RevCol, the first version: convolutional reversible columns and their intermediate supervision."""
