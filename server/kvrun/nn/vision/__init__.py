"""What turns an image into rows for the embedding. Every rank does all of it alike, and nothing of it lies in pages."""
