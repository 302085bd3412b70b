"""What lies in a folder or an archive: which files are images, and sets in formats of their own."""
