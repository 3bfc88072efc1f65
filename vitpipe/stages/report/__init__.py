"""Stage `report`: every result compared with the published row."""
