"""Real datasets in the forms in which people have them on disk: folders, tars, zips, parquet, pickles."""
