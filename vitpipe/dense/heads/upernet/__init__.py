"""UPerNet's heads."""
