"""Masked image modelling on pixels (MAE, iTPN, RevColV2)."""
