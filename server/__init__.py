"""The coordinator's doors: Flower's SuperLink, its runs, and the bytes between them and the sites."""
