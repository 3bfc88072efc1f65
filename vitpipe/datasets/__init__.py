"""What there is: catalogue, readers of raw sets in every form, layouts, the embedded sets."""
