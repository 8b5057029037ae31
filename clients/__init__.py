"""The partner's doors: the bytes between a site and the world. Nothing here knows what the bytes mean."""
