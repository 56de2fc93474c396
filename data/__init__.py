"""Images: where they come from, how they are cropped, and batches of them."""
