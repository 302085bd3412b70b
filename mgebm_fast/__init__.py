"""Multi-grid energy-based models of images, sampled and trained at the speed of the hardware."""
