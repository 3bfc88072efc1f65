"""Stage `probe`: frozen features by nearest neighbours and a linear classifier."""
