"""Readers of classification sets in released formats: class folders, tars, zips, parquet, pickles, MATLAB."""
