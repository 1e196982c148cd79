"""From an image's bytes to the pictures that an encoder reads. Knows pixels and sizes, no model and no tensor of torch."""
